"""Shards: the tokens of a few megabytes of text in one file, made by any process, in any order, again after a kill.

A shard holds its documents' tokens one behind the other, and for each document its length, its size in UTF-8 and its
position (which decides the split). It depends on its parts of the sources, the tokenizer and the seed alone, so shards
of several attempts and of any number of processes together are the same bytes.
"""

import io
import json
import os
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.documents import PART_BYTES, Item, Part, PartReader, cut
from nemo_minitron.data.encoder import TextEncoder
from nemo_minitron.data.splits import position_of_bytes
from nemo_minitron.data.survey import SourceFile
from nemo_minitron.data.tally import PLACES, Fault
from nemo_minitron.errors import DataError

MOST_SHARDS = 4096
"""About how many shards there are at most: those of large sources are larger."""

_GOOD_SHARDS = 512
"""About how many there are of middling sources: at the end some processes wait while others make their last shard."""
_LEAST_BYTES = 1 << 20

_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class ShardJob:
    """What all shards of a stage have in common; plain data, so that it travels to other processes."""

    files: tuple[SourceFile, ...]
    text_key: str
    min_characters: int
    seed: int
    encoder: TextEncoder
    dtype: str
    """Of the token files: `uint16` or `int32`."""
    folder: Path
    """Where shards lie."""


@dataclass(frozen=True)
class Unit:
    """What becomes one shard."""

    number: int
    parts: tuple[Part, ...]

    @property
    def weight(self) -> int:
        """Bytes of the sources on the disk that it stands for."""
        return sum(part.weight for part in self.parts)


@dataclass
class PartCounts:
    """What one part came to."""

    file: int
    weight: int
    """Bytes of the file on the disk that it stands for."""
    length: int = 0
    """Lines or rows."""
    documents: int = 0
    tokens: int = 0
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By reason: `count`, `bad`, and the first places as number, label and detail."""

    def skip(self, fault: Fault, item: Item) -> None:
        """Count a document that is not used."""
        row = self.skipped.setdefault(fault.reason, {"count": 0, "bad": fault.bad, "first": []})
        row["count"] += 1
        if len(row["first"]) < PLACES:
            row["first"].append([item.number, item.label, fault.detail])


def shard_bytes(files: Iterable[SourceFile]) -> int:
    """How much text a shard holds: 1 to 8 MiB, or more where that would be too many shards."""
    total = sum(file.size for file in files)
    return max(min(PART_BYTES, max(_LEAST_BYTES, total // _GOOD_SHARDS)), total // MOST_SHARDS)


def units(files: Sequence[SourceFile], size: int) -> Iterator[Unit]:
    """The sources in order, as shards of about so many bytes; the same ones for the same files."""
    parts: list[Part] = []
    held = number = 0
    for part in cut(files, size):
        parts.append(part)
        held += part.load
        if held >= size:
            yield Unit(number, tuple(parts))
            parts, held, number = [], 0, number + 1
    if parts:
        yield Unit(number, tuple(parts))


def shard_path(folder: Path, number: int) -> Path:
    """Where a finished shard lies."""
    return folder / f"{number:06d}.npz"


def make_shard(job: ShardJob, unit: Unit) -> list[dict[str, Any]]:
    """Read, tokenize and write one shard; returns the counts of its parts.

    Raises:
        DataError: A file is damaged, or a token is outside the vocabulary.
    """
    builder = ShardBuilder(job.encoder, job.seed, job.dtype)
    counts: list[PartCounts] = []
    for part in unit.parts:
        counted = PartCounts(part.file, part.weight)
        counts.append(counted)
        reader = PartReader(job.files[part.file], part, job.text_key)
        for item in reader:
            if item.fault is not None:
                counted.skip(item.fault, item)
            elif len(item.text) < job.min_characters:
                counted.skip(short(job.min_characters), item)
            else:
                counted.documents += 1
                builder.add(item.text)
        counted.length = reader.length
    builder.flush()
    _share_tokens(counts, builder.lengths)
    rows = [vars(counted) for counted in counts]
    builder.save(shard_path(job.folder, unit.number), rows)
    return rows


def short(min_characters: int) -> Fault:
    """Why a short document is not used."""
    return Fault(f"shorter than data.min_characters = {min_characters}", bad=False)


def _share_tokens(counts: list[PartCounts], lengths: Sequence[int]) -> None:
    first = 0
    for counted in counts:
        counted.tokens = sum(lengths[first : first + counted.documents])
        first += counted.documents


class ShardBuilder:
    """Documents to the arrays of a shard.

    Args:
        encoder: Of the model's tokenizer.
        seed: Which documents go where.
        dtype: Of the tokens.

    Attributes:
        lengths: Tokens of each document so far, as far as `flush` has come.
    """

    def __init__(self, encoder: TextEncoder, seed: int, dtype: str) -> None:
        self.encoder, self.seed, self.dtype = encoder, seed, np.dtype(dtype)
        self.lengths: list[int] = []
        self._tokens: list[NDArray[Any]] = []
        self._sizes: list[int] = []
        self._positions: list[float] = []
        self._texts: list[str] = []
        self._characters = 0

    def add(self, text: str) -> None:
        """Take a document."""
        data = text.encode()
        self._texts.append(text)
        self._sizes.append(len(data))
        self._positions.append(position_of_bytes(data, self.seed))
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Tokenize what has been taken.

        Raises:
            DataError: A token is outside the vocabulary.
        """
        for tokens in self.encoder.encode(self._texts):
            self._tokens.append(tokens.astype(self.dtype))
            self.lengths.append(len(tokens))
        self._texts, self._characters = [], 0

    def save(self, path: Path, parts: list[dict[str, Any]]) -> None:
        """Write the shard, bring it to the disk, then put it in place."""
        # Two nodes may make one shard at a time, in processes of one number.
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    tokens=np.concatenate([np.zeros(0, self.dtype), *self._tokens]),
                    lengths=np.array(self.lengths, dtype=np.int32),
                    sizes=np.array(self._sizes, dtype=np.int64),
                    positions=np.array(self._positions, dtype=np.float64),
                    parts=np.frombuffer(json.dumps(parts).encode(), dtype=np.uint8),
                )
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Shard:
    """A finished shard, read piece by piece."""

    path: Path

    def array(self, name: str) -> NDArray[Any]:
        """One of `arrays`."""
        return self.arrays(name)[0]

    def arrays(self, *names: str) -> list[NDArray[Any]]:
        """`tokens` `[sum of lengths]`; `lengths`, `sizes` and `positions`, each `[documents]`.

        Raises:
            DataError: The file is damaged.
        """
        try:
            with np.load(self.path) as arrays:
                found = [arrays[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self.path}: {error}", rule="a complete shard", remedy="remove it and repeat the command"
            ) from error
        return found

    def parts(self) -> list[dict[str, Any]]:
        """Counts of its parts, as `make_shard` returned them."""
        return list(json.load(io.BytesIO(self.array("parts").tobytes())))
