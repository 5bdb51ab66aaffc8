"""A `tokenizer.model` in tiktoken's form as a tokenizer of the `tokenizers` library: what `transformers` makes of it.

A line is a byte string in base64 and its rank. The file says neither how a text is cut nor which special tokens there
are: the first is Llama 3's pattern, as in `transformers` (`TikTokenConverter`), the second stands in
`tokenizer_config.json` under `added_tokens_decoder`.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from nemo_minitron.checkpoints.sentencepiece_tokenizer import around
from nemo_minitron.checkpoints.tekken_tokenizer import rank_tokenizer
from nemo_minitron.errors import CheckpointError

LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def is_tiktoken(data: bytes) -> bool:
    """Whether a file begins like tiktoken's."""
    return _FIRST_LINE.match(data) is not None


def tiktoken_json(files: Mapping[str, bytes], *, where: str) -> dict[str, bytes]:
    """`tokenizer.json` for a checkpoint whose only tokenizer is a tiktoken file.

    Ids between special tokens that nothing names get `<|reserved_token_ID|>`, as in `transformers`. BOS and EOS come
    around a text where `tokenizer_config.json` says so (`add_bos_token`, `add_eos_token`).

    Raises:
        CheckpointError: The file is damaged, or `tokenizer_config.json` does not name the special tokens.
    """
    ranks = _ranks(files["tokenizer.model"], where)
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    added = {int(key): token["content"] for key, token in (config.get("added_tokens_decoder") or {}).items()}
    if not added:
        raise CheckpointError(
            f"{where}: is a file of tiktoken, which names no special tokens",
            rule="tokenizer_config.json names them under added_tokens_decoder",
            remedy="put the model's tokenizer.json or tokenizer_config.json beside it",
        )
    if low := [f"{content!r} at {key}" for key, content in added.items() if key < len(ranks)]:
        raise CheckpointError(f"{where}: added token {low[0]}", rule=f"behind the {len(ranks)} ranks of the file")
    ids = range(len(ranks), max(added) + 1)
    special = {added.get(index, f"<|reserved_token_{index}|>"): index for index in ids}
    tokenizer = rank_tokenizer(ranks, LLAMA_3_PATTERN, special, first=0)
    ends = {name: _text(config.get(f"{name}_token")) for name in ("bos", "eos")}
    first, last = bool(config.get("add_bos_token")), bool(config.get("add_eos_token"))
    tokenizer.post_processor = around(
        {name: (text, special[text]) for name, text in ends.items() if text in special},
        add_bos=first,
        add_eos=last,
        where=where,
    )
    return {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}


def _text(token: Any) -> str:
    """A special token's text, which may stand in a mapping with flags."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _ranks(data: bytes, where: str) -> dict[bytes, int]:
    try:
        rows = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{where}: a line is not base64 and a rank ({error})", rule="tiktoken's form") from error
    if sorted(ranks.values()) != list(range(len(rows))):
        raise CheckpointError(f"{where}: ranks leave a gap, or one comes twice", rule="ranks from 0 on")
    return ranks
