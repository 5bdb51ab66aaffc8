"""Ids of special tokens: those of `config.json`, which need not be those of `generation_config.json`.

transformers builds a model with the first and generates with the second. Other formats have a place for the second
only, so the first travel in a file of their own where the two differ.
"""

import json
from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.keys import SPECIAL_IDS

IDS_FILE = "minitron_ids.json"
"""`bos_token_id`, `eos_token_id` and `pad_token_id` of `config.json` where the other files do not say the same."""

GENERATION_FILE = "generation_config.json"


def ids_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Special ids that `config.json` is to have; None for what no file names.

    From `IDS_FILE`, else from the generation defaults, else from the tokenizer's own special tokens.
    """
    if IDS_FILE in files:
        found = _read(files[IDS_FILE])
        return {key: found.get(key) for key in SPECIAL_IDS}
    if GENERATION_FILE in files:
        found = _read(files[GENERATION_FILE])
        if any(found.get(key) is not None for key in SPECIAL_IDS):
            return {key: found.get(key) for key in SPECIAL_IDS}
    return {key: _of_tokenizer(files, key.removesuffix("_id")) for key in SPECIAL_IDS}


def with_ids(files: Mapping[str, bytes], ids: Mapping[str, Any]) -> dict[str, bytes]:
    """Files that say the special ids of a `config.json`: generation defaults if there were none, or `IDS_FILE`."""
    named = {key: value for key, value in ids.items() if value is not None}
    found = dict(files)
    if GENERATION_FILE not in found and named:
        found[GENERATION_FILE] = json_bytes(named)
    if ids_of(found) != dict(ids):
        found[IDS_FILE] = json_bytes(dict(ids))
    return found


def generation_ends(files: Mapping[str, bytes]) -> tuple[int, ...]:
    """Tokens that end a generated text, as transformers takes them: of the generation defaults, else of the others."""
    found = _read(files.get(GENERATION_FILE, b"")).get("eos_token_id")
    found = ids_of(files)["eos_token_id"] if found is None else found
    return tuple(token for token in (found if isinstance(found, list) else [found]) if type(token) is int)


def json_bytes(data: Any) -> bytes:
    """JSON as files of ours have it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _of_tokenizer(files: Mapping[str, bytes], name: str) -> int | None:
    token = _read(files.get("tokenizer_config.json", b"")).get(name)
    content = token.get("content") if isinstance(token, Mapping) else token
    data = _read(files.get("tokenizer.json", b""))
    for added in data.get("added_tokens") or ():
        if isinstance(added, Mapping) and content is not None and added.get("content") == content:
            return added.get("id") if type(added.get("id")) is int else None
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    found = vocabulary.get(content) if isinstance(vocabulary, Mapping) and isinstance(content, str) else None
    return found if type(found) is int else None


def _read(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
