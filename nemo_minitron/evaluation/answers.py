"""What a model has answered so far, in a file that survives a kill: the same evaluation again asks only the rest."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            path.write_text("".join(lines), encoding="utf-8")
        for line in lines:
            key, answer = json.loads(line)
            self._known[key] = answer

    def __len__(self) -> int:
        """Number of answers."""
        return len(self._known)

    def get(self, *request: Any) -> Any:
        """The answer to a request that is JSON data; None if there is none yet."""
        return self._known.get(_key(request))

    def add(self, pairs: Sequence[tuple[tuple[Any, ...], Any]]) -> None:
        """Keep answers to requests, on disk when it returns."""
        lines = []
        for request, answer in pairs:
            key = _key(request)
            self._known[key] = answer
            lines.append(json.dumps([key, answer]) + "\n")
        if self.path is not None and lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def _key(request: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
