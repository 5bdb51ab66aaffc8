"""Files that travel with a model from reader to writer, and those that go nowhere."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from nemo_minitron.checkpoints.sentencepiece_tokenizer import tokenizer_json
from nemo_minitron.checkpoints.source import LICENCE_FILES, PLAN_FILE, TOKENIZER_FILES
from nemo_minitron.checkpoints.special_ids import IDS_FILE
from nemo_minitron.checkpoints.tekken_tokenizer import tekken_files
from nemo_minitron.checkpoints.tiktoken_file import is_tiktoken, tiktoken_json
from nemo_minitron.errors import CheckpointError

_MORE_TEMPLATES = re.compile(r"^additional_chat_templates/[\w.-]+\.jinja$", re.ASCII)
_OURS = ("config.json", "README.md", "model.safetensors.index.json", "pytorch_model.bin.index.json", ".gitattributes")


def travels(name: str) -> bool:
    """Whether a file of this name, relative to the folder of its kind, travels."""
    return name in (*TOKENIZER_FILES, *LICENCE_FILES, PLAN_FILE, IDS_FILE) or bool(_MORE_TEMPLATES.match(name))


def order_of(names: Iterable[str]) -> list[str]:
    """Those that travel, tokenizers first."""
    known = (*TOKENIZER_FILES, *LICENCE_FILES, PLAN_FILE, IDS_FILE)
    found = [name for name in set(names) if travels(name)]
    return sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))


def travelling_names(folder: Path) -> list[str]:
    """Files of a folder that travel."""
    return [name for name in order_of(_names(folder)) if name != IDS_FILE]


def left_files(folder: Path, taken: Iterable[str]) -> list[str]:
    """Files and folders of a folder that are neither read nor carried on, hidden ones aside."""
    names = {name.split("/")[0] for name in taken} | set(_OURS)
    return sorted(path.name for path in folder.iterdir() if path.name not in names and not path.name.startswith("."))


def _names(folder: Path) -> list[str]:
    more = folder / "additional_chat_templates"
    inner = [f"{more.name}/{path.name}" for path in more.iterdir()] if more.is_dir() else []
    return [path.name for path in folder.iterdir() if path.is_file()] + inner


def with_tokenizer_json(files: Mapping[str, bytes], *, where: str) -> dict[str, bytes]:
    """Files with a `tokenizer.json` made out of a `tokenizer.model` or `tekken.json` where there was none.

    A file that cannot be converted stays as it is; `tokenizer_problem` says why.
    """
    found = dict(files)
    try:
        return found | _made(found, where)
    except CheckpointError:
        return found


def tokenizer_problem(files: Mapping[str, bytes], *, where: str) -> str:
    """Why the tokenizer among files cannot be used; "" if it can."""
    if "tokenizer.json" in files:
        return ""
    try:
        return "" if _made(files, where) else "there is no tokenizer.json, tokenizer.model or tekken.json"
    except CheckpointError as error:
        return error.what


def _made(files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    if "tokenizer.json" in files:
        return {}
    if "tekken.json" in files and "tokenizer.model" not in files:
        made = tekken_files(files["tekken.json"], where=f"{where}: tekken.json")
    elif "tokenizer.model" in files and is_tiktoken(files["tokenizer.model"]):
        made = tiktoken_json(files, where=f"{where}: tokenizer.model")
    elif "tokenizer.model" in files:
        made = tokenizer_json(files, where=f"{where}: tokenizer.model")
    else:
        return {}
    return {name: data for name, data in made.items() if name not in files}
