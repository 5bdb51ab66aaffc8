"""`metrics.jsonl`: rows of JSON, one per line. Standard library only."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.json_lines import read_rows

Row = dict[str, Any]


class MetricsFile:
    """Rows of JSON, one per line, appended and flushed at once.

    A run that was cut off goes on from a checkpoint that may be older than its last rows. So the first row written by a
    process removes those of its stage that do not come before it: their steps are done again. `resume` does so for a
    training that writes its first row some steps later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def resume(self, stage: str | None, step: int) -> None:
        """Remove rows of a stage that belong to later steps than the one training goes on from."""
        if self._file is None:
            self._drop(lambda row: row.get("stage") == stage and row["step"] > step)

    def write(self, row: Row) -> None:
        """Append a row; it has at least `step`."""
        if self._file is None:
            self._drop(lambda old: old.get("stage") == row.get("stage") and _order(old) >= _order(row))
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def _drop(self, is_stale: Callable[[Row], bool]) -> None:
        if not self.path.is_file():
            return
        kept = [row for row in read_rows(self.path) if not is_stale(row)]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)


def _order(row: Row) -> tuple[int, bool]:
    """A step is validated after it was done."""
    return row["step"], any(key.startswith("val/") for key in row)
