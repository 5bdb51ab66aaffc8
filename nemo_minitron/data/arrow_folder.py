"""Folders that the `datasets` library has saved: which of their Arrow files are the data set, and which are caches."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.errors import DataError

_STATE = "state.json"
_SPLITS = "dataset_dict.json"


def wanted(root: Path, inside: Iterable[Path]) -> dict[Path, str]:
    """Why some files below a folder are no part of the data set beside them.

    Args:
        root: The source folder.
        inside: All files, relative to it.

    Raises:
        DataError: A data set is a selection of rows, which its files alone do not tell; or it is not complete.
    """
    files = list(inside)
    arrow = {path.parent for path in files if path.suffix == ".arrow"}
    states = {
        path.parent: _read(root / path, "_data_files") for path in files if path.name == _STATE and path.parent in arrow
    }
    for folder, state in states.items():
        _check_there(root / folder, _STATE, [row.get("filename") for row in state["_data_files"]])
    for path in files:
        if path.name == _SPLITS and any(path.parent in folder.parents for folder in arrow):
            _check_there(root / path.parent, _SPLITS, _read(root / path, "splits")["splits"])
    reasons: dict[Path, str] = {}
    for path in files:
        if path.parent not in states or path.suffix != ".arrow":
            continue
        state = states[path.parent]
        if state.get("_indices_files"):
            raise DataError(
                f"{root / path.parent}: the data set is a selection of rows of its files",
                rule=f"{_STATE} names no _indices_files",
                remedy="call flatten_indices() on the data set and save it again",
            )
        if path.name not in {row.get("filename") for row in state["_data_files"]}:
            reasons[path] = "a cache of the datasets library"
    return reasons


def _check_there(folder: Path, name: str, entries: list[Any]) -> None:
    """Everything that a data set names lies in its folder."""
    missing = [entry for entry in entries if not isinstance(entry, str) or not (folder / entry).exists()]
    if missing:
        raise DataError(
            f"{folder / name}: names {missing[0]!r}, which is not there",
            rule="a data set is complete",
            remedy="copy the data set again, or name the files that are to be used in data.sources",
        )


def _read(path: Path, key: str) -> dict[str, Any]:
    """What the library notes beside its files, with a list under `key`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    rows = found.get(key) if isinstance(found, dict) else None
    if not isinstance(rows, list) or (key == "_data_files" and not all(isinstance(row, dict) for row in rows)):
        raise _damaged(path, f"no list under {key!r}")
    return dict(found)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path}: {why}",
        rule="what the datasets library writes beside its .arrow files",
        remedy="copy the data set again, or name the files that are to be used in data.sources",
    )
