"""Shards to Megatron's `.bin` and `.idx` of each split: read once, written once, digests taken on the way.

The index is that of Megatron's `IndexedDataset`, one sequence a document: a header, lengths, byte offsets, and where
documents begin. It is written from arrays, since a list of Python integers takes longer than the tokens themselves.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.shards import Shard
from nemo_minitron.data.splits import assign_positions, requested, splits_at

if TYPE_CHECKING:
    from nemo_minitron.config.run import DataConfig

_HEADER = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {"int32": 4, "uint16": 8}


@dataclass
class SplitWriter:
    """One pair of token files.

    Args:
        prefix: Path without `.bin` and `.idx`.
        dtype: `uint16` or `int32`.

    Attributes:
        documents: Written so far.
        tokens: Written so far.
    """

    prefix: Path
    dtype: str
    documents: int = 0
    tokens: int = 0
    _lengths: list[NDArray[np.int32]] = field(default_factory=list)
    _digest: Any = field(default_factory=hashlib.sha256)
    _file: IO[bytes] | None = None

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int32]) -> None:
        """Append documents: their tokens one behind the other, and how many each has."""
        if self._file is None:
            self._file = Path(f"{self.prefix}.bin").open("wb")  # noqa: SIM115  closed by finish
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(lengths.astype(np.int32))
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def finish(self) -> str:
        """Close both files; returns the SHA-256 of their two SHA-256 digests."""
        if self._file is None:
            self._file = Path(f"{self.prefix}.bin").open("wb")  # noqa: SIM115
        self._file.close()
        index = _index(np.concatenate([np.zeros(0, np.int32), *self._lengths]), self.dtype)
        Path(f"{self.prefix}.idx").write_bytes(index)
        return hashlib.sha256(self._digest.digest() + hashlib.sha256(index).digest()).hexdigest()


def _index(lengths: NDArray[np.int32], dtype: str) -> bytes:
    count = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    pointers = np.concatenate([np.zeros(min(count, 1), np.int64), ends[:-1]])
    head = _HEADER + struct.pack("<QBQQ", 1, _DTYPE_CODES[dtype], count, count + 1)
    return b"".join((head, lengths.tobytes(), pointers.tobytes(), np.arange(count + 1, dtype=np.int64).tobytes()))


def merge(
    shards: Sequence[Shard], config: "DataConfig", folder: Path, dtype: str, *, small_corpus: int
) -> dict[str, dict[str, Any]]:
    """Share the documents of all shards out between the splits, in order.

    Args:
        shards: In order.
        config: Fractions of the splits.
        folder: Gets `<split>.bin` and `<split>.idx`.
        dtype: `uint16` or `int32`.
        small_corpus: With fewer documents a split may come out empty by chance: they are shared out as a whole.

    Returns:
        `documents`, `tokens`, `bytes` and `sha256` of each split.

    Raises:
        DataError: There are fewer different documents than splits.
    """
    writers = {split: SplitWriter(folder / split, dtype) for split in requested(config)}
    sizes = dict.fromkeys(writers, 0)
    chosen = _chosen(shards, config, small_corpus)
    first = 0
    for shard in shards:
        tokens, lengths, positions, bytes_each = shard.arrays("tokens", "lengths", "positions", "sizes")
        flags = (
            splits_at(positions, config)
            if chosen is None
            else {split: chosen[first : first + len(lengths)] == split for split in writers}
        )
        first += len(lengths)
        for split, writer in writers.items():
            mask = flags[split]
            if mask.any():
                writer.add(tokens[np.repeat(mask, lengths)], lengths[mask])
                sizes[split] += int(bytes_each[mask].sum())
    return {
        str(split): {
            "documents": writer.documents,
            "tokens": writer.tokens,
            "bytes": sizes[split],
            "sha256": writer.finish(),
        }
        for split, writer in writers.items()
    }


def _chosen(shards: Sequence[Shard], config: "DataConfig", small_corpus: int) -> NDArray[np.str_] | None:
    """The split of each document of a small corpus; None for a large one, whose documents are decided one by one."""
    positions: list[float] = []
    for shard in shards:
        positions += shard.array("positions").tolist()
        if len(positions) >= small_corpus:
            return None
    return np.array([str(split) for split in assign_positions(positions, config)], dtype=np.str_)
