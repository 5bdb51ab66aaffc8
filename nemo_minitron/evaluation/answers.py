"""What a model has answered so far, in a file that survives a kill: the same evaluation again asks only the rest."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.json_lines import append_rows, rows_to_continue


class AnswerFile:
    """Answers by request, one JSON line each; a line that was cut off is left out.

    Args:
        path: Appended to; None keeps nothing. It belongs to one model: a key does not say which.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is None:
            return
        self._known.update(rows_to_continue(path))

    def __len__(self) -> int:
        """Number of answers."""
        return len(self._known)

    def get(self, *request: Any) -> Any:
        """The answer to a request that is JSON data; None if there is none yet."""
        return self._known.get(_key(request))

    def add(self, pairs: Sequence[tuple[tuple[Any, ...], Any]]) -> None:
        """Keep answers to requests, on disk when it returns."""
        rows = [(_key(request), answer) for request, answer in pairs]
        self._known.update(rows)
        if self.path is not None and rows:
            append_rows(self.path, rows)


def _key(request: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
