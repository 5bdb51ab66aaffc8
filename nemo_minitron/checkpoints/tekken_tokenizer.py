"""Mistral's `tekken.json` as a tokenizer of the `tokenizers` library, id for id.

config.pattern                      how a text is cut before its bytes are joined
config.default_num_special_tokens   ids below are special tokens'
config.default_vocab_size           ids of both kinds together
vocab[].rank, .token_bytes          byte strings; two neighbours are joined where their union has the lowest rank
special_tokens[].rank, .token_str
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.checkpoints.plain_data import read_json
from nemo_minitron.checkpoints.sentencepiece_tokenizer import around
from nemo_minitron.checkpoints.special_ids import json_bytes
from nemo_minitron.errors import CheckpointError

_BOS, _EOS = "<s>", "</s>"
_SPECIAL = ("<unk>", _BOS, _EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
_MORE_SPECIAL = ("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]")
_LAST_SPECIAL = ("[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
DEFAULT_SPECIAL = (*_SPECIAL, *_MORE_SPECIAL, *_LAST_SPECIAL)
"""Special tokens of files that list none (before v11), in order."""


def byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


def tekken_files(data: bytes, *, where: str) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` of a `tekken.json`; a sequence begins with BOS.

    Raises:
        CheckpointError: It is damaged, or lacks what it needs.
    """
    content = read_json(data, where=where)
    try:
        config = content["config"]
        count, size = config["default_num_special_tokens"], config["default_vocab_size"]
        ranks = {base64.b64decode(item["token_bytes"], validate=True): item["rank"] for item in content["vocab"]}
        ranks = {token: rank for token, rank in ranks.items() if rank < size - count}
        listed = content.get("special_tokens") or [
            {"rank": rank, "token_str": name} for rank, name in enumerate(DEFAULT_SPECIAL)
        ]
        special = {item["rank"]: item["token_str"] for item in listed}
        pattern = config["pattern"]
    except (KeyError, TypeError, ValueError, binascii.Error, AttributeError) as error:
        raise CheckpointError(f"{where}: not a tekken file ({type(error).__name__}: {error})") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or max(special, default=0) >= count:
        raise CheckpointError(
            f"{where}: ranks leave a gap, or special tokens reach beyond default_num_special_tokens = {count}",
            rule="ranks from 0 on, special tokens below the others",
        )
    names = {rank: special.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)}
    tokenizer = _tokenizer(ranks, pattern, list(names.values()), where)
    named = {f"{key}_token": token for key, token in (("bos", _BOS), ("eos", _EOS), ("unk", "<unk>"), ("pad", "<pad>"))}
    config_data = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: token for key, token in named.items() if token in special.values()},
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json_bytes(config_data),
    }


def _tokenizer(ranks: dict[bytes, int], pattern: str, special: list[str], where: str) -> Any:
    ids = {name: index for index, name in enumerate(special)}
    tokenizer = rank_tokenizer(ranks, pattern, ids, first=len(special))
    bos = {"bos": (_BOS, ids[_BOS])} if _BOS in ids else {}
    tokenizer.post_processor = around(bos, add_bos=_BOS in ids, add_eos=False, where=where)
    return tokenizer


def set_byte_level(tokenizer: Any, patterns: Sequence[str]) -> None:
    """Have a tokenizer cut texts by patterns and work on their bytes, each written as a letter."""
    from tokenizers import Regex, decoders, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    tokenizer.decoder = decoders.ByteLevel()


def rank_tokenizer(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int], *, first: int) -> Any:
    """A `tokenizers.Tokenizer` of byte strings with ranks; it puts nothing around a text.

    Args:
        ranks: From 0 on; two neighbours are joined where their union has the lowest one.
        pattern: How a text is cut before.
        special: Special tokens and their ids.
        first: Id of rank 0.
    """
    from tokenizers import AddedToken, Tokenizer, models

    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = dict(special) | {spelled(token): rank + first for token, rank in ranks.items()}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += [(spelled(left), spelled(right)) for left, right in known]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    set_byte_level(tokenizer, [pattern])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer
