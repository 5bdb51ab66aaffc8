"""Files of JSON, one value per line, that are appended to and may lose their end in a crash. Standard library only."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[Any]:
    """All values of a file, none where there is no file; a line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rows_to_continue(path: Path) -> list[Any]:
    """The same, and a last line that was cut short is taken out of the file, so that it can be appended to."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return read_rows(path)


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Add values at the end of a file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def without_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=...)`, which takes the last of two equal keys.

    Raises:
        ValueError: A key occurs twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found
