"""Which node makes which shard, where several see one folder: the first to make a file `NNNNNN.claim` does.

Nothing depends on who it is: a shard made twice is the same bytes, and is put in place in one step.
"""

import os
from pathlib import Path

_STOPPED = "stopped.claim"


class Claims:
    """What this node has taken upon itself.

    Args:
        folder: Where shards and claims lie, on a disk that all nodes see.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mine: set[int] = set()

    def take(self, number: int) -> bool:
        """Claim a shard; False if another node has, or the work was stopped."""
        if (self._folder / _STOPPED).exists():
            return False
        try:
            os.close(os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        self._mine.add(number)
        return True

    def is_taken(self, number: int) -> bool:
        """Whether any node has claimed a shard."""
        return self._path(number).exists()

    def stop(self) -> None:
        """No node is to begin another shard."""
        (self._folder / _STOPPED).touch()

    def give_up(self) -> None:
        """Leave this node's claims to others."""
        for number in self._mine:
            self._path(number).unlink(missing_ok=True)
        self._mine.clear()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.claim"


def clear_claims(folder: Path) -> None:
    """Forget the claims of an earlier attempt, before any node begins."""
    for path in folder.glob("*.claim"):
        path.unlink(missing_ok=True)
