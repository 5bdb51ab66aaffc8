"""Folders that the `datasets` library has saved: which of their Arrow files are the data set, and which are caches."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.errors import DataError

_STATE = "state.json"


def wanted(root: Path, inside: Iterable[Path]) -> dict[Path, str]:
    """Why some files below a folder are no part of the data set beside them.

    Args:
        root: The source folder.
        inside: All files, relative to it.

    Raises:
        DataError: A data set is a selection of rows, which its files alone do not tell.
    """
    files = list(inside)
    states = {path.parent: _read(root / path) for path in files if path.name == _STATE}
    reasons: dict[Path, str] = {}
    for path in files:
        state = states.get(path.parent)
        if state is None or path.suffix != ".arrow":
            continue
        if state.get("_indices_files"):
            raise DataError(
                f"{root / path.parent}: the data set is a selection of rows of its files",
                rule=f"{_STATE} names no _indices_files",
                remedy="call flatten_indices() on the data set and save it again",
            )
        if path.name not in {row.get("filename") for row in state.get("_data_files", ())}:
            reasons[path] = "a cache of the datasets library"
    return reasons


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and "_data_files" in state else {}
