"""Shards: consecutive samples in one file, each with checksums of its targets and of the tokens they belong to.

8 bytes   magic
4 bytes   length of the header, little-endian
4 bytes   CRC-32 of the header
header    JSON: cache (the manifest's digest), first, ends (byte after each sample), crc, tokens_crc
the rest  the samples' bytes, one behind the other
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.errors import CacheError

MAGIC = b"NMTGT\x00\x00\x01"
_MOST_HEADER_BYTES = 64 << 20


def tokens_checksum(tokens: NDArray[np.int64]) -> int:
    """What binds a sample's targets to its tokens."""
    return zlib.crc32(np.ascontiguousarray(tokens, "<i8").tobytes())


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample's targets as bytes, and the checksum of its tokens."""

    data: bytes
    tokens_crc: int


def write_shard(path: Path, *, cache: str, first: int, samples: Sequence[EncodedSample]) -> None:
    """Write a shard under a temporary name, then put it in place."""
    ends = np.cumsum([len(sample.data) for sample in samples]).tolist()
    header = json.dumps(
        {
            "cache": cache,
            "first": first,
            "ends": ends,
            "crc": [zlib.crc32(sample.data) for sample in samples],
            "tokens_crc": [sample.tokens_crc for sample in samples],
        }
    ).encode()
    with staged_file(path) as partial, partial.open("wb") as file:
        file.write(MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little") + header)
        for sample in samples:
            file.write(sample.data)


class Shard:
    """A shard open for reading; its samples are read one at a time.

    Raises:
        CacheError: It is missing, damaged, cut off, or of another cache. Names the file.
    """

    def __init__(self, path: Path, *, cache: str, first: int, count: int) -> None:
        self.path = path
        header, self._start = _read_header(path)
        if header.get("cache") != cache or header.get("first") != first:
            raise CacheError(
                f"{path}: belongs to another cache, or to other samples",
                rule="a folder holds the shards of one cache",
                remedy="delete this shard and run the cache command again: only what is missing is written",
            )
        self._first = first
        self._ends, self._crc, self._tokens_crc = (_numbers(header, key, count, path) for key in _LISTS)
        size = path.stat().st_size
        whole = self._start + (self._ends[-1] if self._ends else 0)
        if sorted(self._ends) != self._ends or size != whole:
            raise _damaged(path, f"{size} of {whole} bytes")

    def read(self, sample: int) -> EncodedSample:
        """One sample, by its number in the complete cache, checked.

        Raises:
            CacheError: Its bytes are not what was written.
        """
        index = sample - self._first
        start = self._ends[index - 1] if index else 0
        with self.path.open("rb") as file:
            file.seek(self._start + start)
            data = file.read(self._ends[index] - start)
        if zlib.crc32(data) != self._crc[index]:
            raise _damaged(self.path, f"sample {sample} does not have its checksum")
        return EncodedSample(data, self._tokens_crc[index])

    def check(self) -> None:
        """Read every sample.

        Raises:
            CacheError: One is damaged.
        """
        for index in range(len(self._ends)):
            self.read(self._first + index)


_LISTS = ("ends", "crc", "tokens_crc")


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[8:12], "little")
            if start[:8] != MAGIC or len(start) < 16 or length > _MOST_HEADER_BYTES:
                raise _damaged(path, "not the start of a shard")
            data = file.read(length)
    except FileNotFoundError as error:
        raise CacheError(
            f"{path}: missing", remedy="run the cache command again: only what is missing is written"
        ) from error
    if len(data) < length or zlib.crc32(data) != int.from_bytes(start[12:], "little"):
        raise _damaged(path, "its header does not have its checksum")
    header: dict[str, Any] = json.loads(data)
    return header, 16 + length


def _numbers(header: dict[str, Any], key: str, count: int, path: Path) -> list[int]:
    values = header.get(key)
    if not isinstance(values, list) or len(values) != count or not all(type(value) is int for value in values):
        raise _damaged(path, f"{key} is not a list of {count} numbers")
    return values


def _damaged(path: Path, what: str) -> CacheError:
    return CacheError(
        f"{path}: damaged ({what})",
        rule="every shard is as it was written",
        remedy="run the cache command again: it replaces damaged shards and keeps the others",
    )
