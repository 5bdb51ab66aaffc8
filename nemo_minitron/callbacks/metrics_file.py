"""`metrics.jsonl`: rows of JSON, one a line. Standard library only."""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class MetricsFile:
    """Rows of JSON, one a line, appended and flushed at once.

    A run that was cut off goes on from a checkpoint that may be older than its last rows. So the first row written by a
    process removes those of its stage that it is about to write again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def write(self, row: Row) -> None:
        """Append a row; it has at least `step`."""
        if self._file is None:
            self._drop_later_than(row)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def _drop_later_than(self, first: Row) -> None:
        if not self.path.is_file():
            return
        kept = [row for row in read_rows(self.path) if not _is_repeated(row, first)]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a metrics file; a line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _is_repeated(row: Row, first: Row) -> bool:
    if row.get("stage") != first.get("stage") or row["step"] < first["step"]:
        return False
    shared = {key for key in row if "/" in key} & first.keys()
    return row["step"] > first["step"] or bool(shared)
