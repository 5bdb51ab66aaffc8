"""Names beside a file or folder that one process alone writes under, and what killed processes have left under them."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class TemporaryNames:
    """Where a process writes what is to become `target`.

    Attributes:
        lock: A file that the process holds a lock on, which the system gives back when it ends, however it ends.
        partial: For what is being written.
        old: For what `target` held before, until the new folder has taken its place.
    """

    lock: Path
    partial: Path
    old: Path

    @classmethod
    def of(cls, target: Path, number: int) -> "TemporaryNames":
        """`.NAME.partial` and its like, or `.NAME.2.partial` for a second process."""
        stem = f".{target.name}" + (f".{number}" if number > 1 else "")
        return cls(*(target.with_name(f"{stem}.{kind}") for kind in ("lock", "partial", "old")))

    @property
    def are_left(self) -> bool:
        """Whether anything lies there."""
        return any(path.exists() for path in (self.lock, self.partial, self.old))


@contextmanager
def temporary_names(target: Path, *, folder: bool) -> Iterator[TemporaryNames]:
    """The first names that no other process has, with nothing under them; what killed processes left goes first.

    Where the file system knows no locks, every process gets the same names.

    Args:
        target: A file or folder that is to be written; its parent exists.
        folder: Which of the two; only a folder has `old`, and gets it back where a kill came between two renames.
    """
    numbered = (TemporaryNames.of(target, number) for number in count(1))
    names, handle = next((names, handle) for names in numbered if (handle := _locked(names.lock)) is not None)
    try:
        _clear(target, names, folder=folder)
        for other in numbered:
            if not other.are_left:
                break
            if (left := _locked(other.lock)) is not None:
                _clear(target, other, folder=folder)
                _release(other.lock, left)
        yield names
    finally:
        _release(names.lock, handle)


def replace_folder(target: Path, names: TemporaryNames) -> None:
    """Let the new folder take the place of the old one, which is left as `names.old`."""
    while True:
        with suppress(FileNotFoundError):  # there is none, or another process has just moved it away
            target.rename(names.old)
        try:
            names.partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(names.old, ignore_errors=True)  # another process came first: its folder is the old one now
        else:
            return


def _clear(target: Path, names: TemporaryNames, *, folder: bool) -> None:
    """Remove what a killed process left, or give it its name back if `target` would be missing."""
    if not folder:
        names.partial.unlink(missing_ok=True)
        return
    if names.old.exists() and not target.exists():
        names.old.rename(target)
    for path in (names.old, names.partial):
        if path.exists():
            shutil.rmtree(path)


def _locked(path: Path) -> int | None:
    """An open handle that holds the lock on a file; None if another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(handle)
                return None
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        os.close(handle)  # the process that had it has removed it since


def _release(path: Path, handle: int) -> None:
    path.unlink(missing_ok=True)
    os.close(handle)
