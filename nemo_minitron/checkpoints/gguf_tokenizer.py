"""The tokenizer inside a GGUF file as Hugging Face files.

transformers rebuilds vocabulary, merges and added tokens. It does not heed `tokenizer.ggml.pre` (how text is cut before
the merges) nor whether a sequence begins with BOS, so both are set here from what the file states.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError

Field = Callable[[str, Any], Any]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Pattern by `tokenizer.ggml.pre` of byte-level BPE; None is GPT-2's own pattern, which ByteLevel has built in.
_PATTERNS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}
_SINGLE_DIGITS = ("smollm",)
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def convert_tokenizer(path: Path, field: Field) -> dict[str, bytes]:
    """Hugging Face tokenizer files, and generation defaults with the special token ids.

    Args:
        path: The GGUF file.
        field: Looks up metadata: `field(key, default)`.

    Raises:
        CheckpointError: There is no tokenizer, or one of a kind that cannot be converted faithfully.
    """
    from transformers import AutoTokenizer

    tokens = field("tokenizer.ggml.tokens", None)
    if not tokens:
        raise CheckpointError(f"{path}: has no tokenizer")
    ids = {name: field(f"tokenizer.ggml.{key}_token_id", None) for name, key in _SPECIAL.items()}
    special = {name: tokens[index] for name, index in ids.items() if index is not None and 0 <= index < len(tokens)}
    try:
        converted = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        backend = converted.backend_tokenizer
    except Exception as error:
        raise CheckpointError(
            f"{path}: its tokenizer cannot be converted ({type(error).__name__}: {error})",
            remedy="import the Hugging Face checkpoint of this model instead",
        ) from error
    if field("tokenizer.ggml.model", None) == "gpt2":
        backend.pre_tokenizer = _pre_tokenizer(path, field("tokenizer.ggml.pre", "default"))
    backend.post_processor = _post_processor(field, special, ids)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(f"{field('general.architecture', '')}.context_length", None),
        **{f"{name}_token": token for name, token in special.items()},
    }
    files = {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json_bytes(config),
        "special_tokens_map.json": _json_bytes({f"{name}_token": token for name, token in special.items()}),
        "generation_config.json": _json_bytes({f"{n}_token_id": ids[n] for n in ("bos", "eos", "pad") if n in special}),
    }
    if template := field("tokenizer.chat_template", None):
        files["chat_template.jinja"] = template.encode()
    return files


def _pre_tokenizer(path: Path, kind: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if kind not in _PATTERNS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre = {kind!r} is not supported",
            rule=f"one of {', '.join(_PATTERNS)}",
            remedy="import the Hugging Face checkpoint of this model instead",
        )
    pattern = _PATTERNS[kind]
    if pattern is not None:
        split = Split(Regex(pattern), behavior="isolated")
        return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=True)
    return Sequence([Digits(individual_digits=True), bytes_]) if kind in _SINGLE_DIGITS else bytes_


def _post_processor(field: Field, special: dict[str, str], ids: dict[str, Any]) -> Any:
    """Puts BOS before and EOS behind a sequence where the file says so."""
    from tokenizers.processors import TemplateProcessing

    around = [name for name in ("bos", "eos") if name in special and field(f"tokenizer.ggml.add_{name}_token", False)]
    before, behind = ([f"{special[name]}:{{i}}"] if name in around else [] for name in ("bos", "eos"))

    def sequence(letter: str, number: int) -> list[str]:
        return [item.format(i=number) for item in (*before, f"${letter}:{{i}}", *behind)]

    return TemplateProcessing(
        single=sequence("A", 0),
        pair=sequence("A", 0) + sequence("B", 1),
        special_tokens=[(special[name], ids[name]) for name in around],
    )


def _json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
