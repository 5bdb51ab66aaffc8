"""Files too large to be worth the page cache, read and written past it where the system offers that.

Reading or writing 16 GB the usual way pushes everything else out of the cache, and making room page by page can cost
more than the disk does. Linux 6.14 and later drop a page at once when they are told to (`RWF_DONTCACHE`), keep what was
cached before, and begin to write as soon as data is there, which also leaves little to do for the fsync at the end.
Elsewhere these files are ordinary ones.
"""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

LARGE = 2 << 30
"""Bytes from which a file is taken to be large: smaller ones are likely to be read again while they are cached."""

_STEP = 8 << 20
_DONTCACHE = 0x80  # RWF_DONTCACHE of linux/fs.h
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


def open_binary(path: Path, mode: Literal["rb", "wb"], *, nbytes: int) -> BinaryIO:
    """`path.open(mode)` for a file that has, or will have, about `nbytes` bytes."""
    if nbytes < LARGE or sys.platform != "linux":
        return path.open(mode)
    raw = _LargeFile(path, mode)
    return cast(BinaryIO, io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw))


class _LargeFile(io.FileIO):
    """A file whose pages are not kept, in steps that end at multiples of 8 MiB."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._flags = _DONTCACHE

    def readinto(self, buffer: Any) -> int:
        """Read what is left of a step, at most."""
        position = self.tell()
        view = memoryview(buffer).cast("B")[: _STEP - position % _STEP]
        count = self._try(os.preadv, view, position)
        self.seek(position + count)
        return count

    def write(self, data: Any) -> int:
        """Write what is left of a step, at most."""
        position = self.tell()
        view = memoryview(data).cast("B")[: _STEP - position % _STEP]
        count = self._try(os.pwritev, view, position)
        self.seek(position + count)
        return count

    def _try(self, call: Any, view: memoryview, position: int) -> int:
        try:
            return int(call(self.fileno(), [view], position, self._flags))
        except OSError as error:
            if not self._flags or error.errno not in _UNSUPPORTED:
                raise
        self._flags = 0
        return int(call(self.fileno(), [view], position))
