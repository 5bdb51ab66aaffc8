"""Files as streams of bytes, whatever they are compressed with."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from nemo_minitron.errors import DataError


def _open_zst(path: Path, mode: str) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.open(path, mode)
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
SUFFIXES = frozenset(_OPENERS)
"""Suffixes of compressed files."""

MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""What a compressed file begins with, whatever its name is."""

READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a damaged file raises."""


def opened(path: Path, compression: str) -> IO[bytes]:
    """The content of a file; of the result only `read(n)` and the context manager are used.

    Args:
        path: A file.
        compression: One of `SUFFIXES`, or "".
    """
    return cast(IO[bytes], _OPENERS.get(compression, open)(path, "rb"))


def damaged(path: Path, error: Exception, where: str = "") -> DataError:
    """What to tell of a file that cannot be read to its end, or that this user may not read."""
    if isinstance(error, PermissionError):
        return DataError(
            f"{path}{where}: this user may not read it",
            rule="every file of data.sources is readable",
            remedy="change its permissions (chmod), or take it out of data.sources",
        )
    return DataError(f"{path}{where}: {error}", rule="a complete, undamaged file", remedy="get the file again")


def decode(data: bytes, path: Path) -> str:
    """UTF-8, with or without a byte order mark.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8",
            rule="texts are UTF-8",
            remedy="convert the file with iconv",
        ) from error
