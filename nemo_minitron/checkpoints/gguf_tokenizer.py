"""The tokenizer inside a GGUF file as Hugging Face files, as llama.cpp reads it.

What a key means, and what is assumed where it is absent, is llama.cpp's: which cut goes with `tokenizer.ggml.pre`,
whether a sequence begins with BOS, which ids are special.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.sentencepiece_file import Kind, Piece, SentencePieces
from nemo_minitron.checkpoints.sentencepiece_tokenizer import around, build_tokenizer
from nemo_minitron.checkpoints.special_ids import json_bytes
from nemo_minitron.checkpoints.tekken_tokenizer import set_byte_level
from nemo_minitron.errors import CheckpointError

Field = Callable[[str, Any], Any]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# Patterns by `tokenizer.ggml.pre` of byte-level BPE; each cuts what the one before has left in one piece.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# Of these every word that is a token is that token, whatever the merges, and a sequence begins with BOS.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
# Models whose own tokenizer composes characters first; llama.cpp does not, and gives other ids for decomposed text.
_COMPOSED = ("qwen2",)
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# For byte-level BPE llama.cpp assumes 11, Falcon's end of text, an ordinary token in other vocabularies: none here.
_DEFAULT_IDS: dict[str, dict[str, int]] = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {}}
_KINDS = frozenset(int(kind) for kind in Kind)


def convert_tokenizer(path: Path, field: Field) -> dict[str, bytes]:
    """Hugging Face tokenizer files, and generation defaults with the special token ids.

    Raises:
        CheckpointError: There is no tokenizer, or one of a kind that cannot be converted faithfully.
    """
    model = field("tokenizer.ggml.model", None)
    tokens = field("tokenizer.ggml.tokens", None)
    if not tokens or model in (None, "no_vocab", "none"):
        raise CheckpointError(f"{path}: has no tokenizer (tokenizer.ggml.model = {model!r})")
    if model not in _DEFAULT_IDS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model = {str(model)[:40]!r} is not supported",
            rule=f"one of {', '.join(_DEFAULT_IDS)}",
            remedy="import the Hugging Face checkpoint of this model instead",
        )
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens holds a token twice", rule="one id for a token")
    kinds = _per_token(path, field, "token_type", len(tokens))
    if strange := sorted({kind for kind in kinds if kind not in _KINDS}):
        raise CheckpointError(f"{path}: tokenizer.ggml.token_type holds {strange[0]}", rule="1 to 6")
    ids = _ids(path, field, model, len(tokens))
    convert = _sentencepiece if model == "llama" else _byte_level
    tokenizer = convert(path, field, tokens, kinds, ids)
    named = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(f"{field('general.architecture', '')}.context_length", None),
        **named,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json_bytes(config),
        "special_tokens_map.json": json_bytes(named),
        "generation_config.json": json_bytes(
            {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if ids[name] is not None}
        ),
    }
    if template := field("tokenizer.chat_template", None):
        files["chat_template.jinja"] = template.encode()
    return files


def _ids(path: Path, field: Field, model: str, size: int) -> dict[str, int | None]:
    """Ids of special tokens; where a key is absent, llama.cpp's default if there is such a token."""
    found: dict[str, int | None] = {}
    for name, key in _SPECIAL.items():
        value = field(f"tokenizer.ggml.{key}_token_id", None)
        if value is not None and not (type(value) is int and 0 <= value < size):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{key}_token_id = {value}, but there are {size} tokens",
                rule="the id of a token",
            )
        assumed = _DEFAULT_IDS[model].get(name)
        found[name] = value if value is not None else assumed if assumed is not None and assumed < size else None
    return found


def _per_token(path: Path, field: Field, key: str, size: int) -> list[Any]:
    """A list with a value for each token.

    Raises:
        CheckpointError: It is missing or too short. llama.cpp takes every token for an ordinary one of score 0 then,
            special tokens and bytes too, which no published model means.
    """
    values = field(f"tokenizer.ggml.{key}", None)
    if not isinstance(values, list) or len(values) < size:
        words = "is missing" if values is None else f"has {len(values)} values"
        raise CheckpointError(
            f"{path}: tokenizer.ggml.{key} {words}",
            rule=f"a value for each of {size} tokens",
            remedy="make the file anew with a recent converter",
        )
    return values[:size]


def _flag(path: Path, field: Field, key: str, default: bool) -> bool:
    value = field(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.{key} = {value!r} is a {type(value).__name__}", rule="true or false, as llama.cpp"
        )
    return value


def _sentencepiece(path: Path, field: Field, tokens: list[str], kinds: list[int], ids: dict[str, int | None]) -> Any:
    scores = _per_token(path, field, "scores", len(tokens))
    model = SentencePieces(
        pieces=tuple(Piece(text, float(s), Kind(k)) for text, s, k in zip(tokens, scores, kinds, strict=True)),
        unigram=False,
        byte_fallback=Kind.BYTE in kinds,
        charsmap=b"",
        add_dummy_prefix=_flag(path, field, "add_space_prefix", True),
        remove_extra_whitespaces=_flag(path, field, "remove_extra_whitespaces", False),
        escape_whitespaces=True,
        ids=ids,
    )
    add_bos, add_eos = _flag(path, field, "add_bos_token", True), _flag(path, field, "add_eos_token", False)
    return build_tokenizer(model, add_bos=add_bos, add_eos=add_eos, where=str(path))


def _byte_level(path: Path, field: Field, tokens: list[str], kinds: list[int], ids: dict[str, int | None]) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    pre = field("tokenizer.ggml.pre", "default") or "default"
    if pre not in _PATTERNS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre = {pre!r} is not supported",
            rule=f"one of {', '.join(_PATTERNS)}",
            remedy="import the Hugging Face checkpoint of this model instead",
        )
    merges = field("tokenizer.ggml.merges", None)
    if merges is None:
        raise CheckpointError(f"{path}: tokenizer.ggml.merges is missing", rule="byte-level BPE has merges")
    whole = pre in _WHOLE_WORDS
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocabulary, [_pair(path, merge) for merge in merges], ignore_merges=whole)
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"{path}: tokenizer.ggml.merges do not fit the tokens ({error})") from error
    tokenizer = Tokenizer(bpe)
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    set_byte_level(tokenizer, _PATTERNS[pre])
    special = {index for name, index in ids.items() if index is not None and field(_key(name), None) is not None}
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (Kind.CONTROL, Kind.UNKNOWN) or index in special:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == Kind.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    named = {name: (tokens[index], index) for name, index in ids.items() if index is not None}
    add_bos, add_eos = _flag(path, field, "add_bos_token", whole), _flag(path, field, "add_eos_token", False)
    tokenizer.post_processor = around(named, add_bos=add_bos, add_eos=add_eos, where=str(path))
    return tokenizer


def _key(name: str) -> str:
    return f"tokenizer.ggml.{_SPECIAL[name]}_token_id"


def _pair(path: Path, merge: str) -> tuple[str, str]:
    """Two neighbours, divided by the first space that is not the first character."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise CheckpointError(f"{path}: tokenizer.ggml.merges holds {merge[:40]!r}", rule="two tokens and a space")
    return merge[:cut], merge[cut + 1 :]
