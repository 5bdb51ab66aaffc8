"""The safetensors format, read and written tensor by tensor.

The `safetensors` library writes a file from all its tensors at once; a 5 GB shard would need 5 GB of memory. The format
is an 8-byte length, a JSON header and the bytes, so we write it ourselves, in the library's own order, byte for byte.
"""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from nemo_minitron.checkpoints.large_files import open_binary
from nemo_minitron.checkpoints.plain_data import read_json
from nemo_minitron.checkpoints.tensors import read_tensor, write_tensor
from nemo_minitron.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Rank of each type in the library's order of tensors within a file (larger first).
_ORDER = {"F64": 0, "F32": 1, "BF16": 2, "F16": 3}
_LARGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """Type, shape and place (from the end of the header) of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file whose header has been read and checked; tensors are read when asked for.

    Raises:
        CheckpointError: The file is missing, truncated, or its header is not sound.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        size = self._size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else _LARGEST_HEADER + 1
            if length > min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = read_json(file.read(length), where=f"{path}: its header")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._data_start = 8 + length
        self.entries: dict[str, Entry] = {name: _parse_entry(name, item, path) for name, item in header.items()}
        self._check_places(size - self._data_start)

    def get(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            KeyError: There is none of that name.
            CheckpointError: The file has shrunk since it was opened.
        """
        entry = self.entries[name]
        with open_binary(self.path, "rb", nbytes=self._size) as file:
            file.seek(self._data_start + entry.start)
            return read_tensor(file, entry.shape, entry.dtype, where=f"{self.path}: {name}")

    def _check_places(self, available: int) -> None:
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start != end:
                raise CheckpointError(f"{self.path}: tensor {name} overlaps another or leaves a gap")
            end += entry.nbytes
        if end != available:
            raise CheckpointError(
                f"{self.path}: {available} bytes of tensors, but the header describes {end}",
                rule="header and data agree",
                remedy="the file is truncated or damaged; fetch it again",
            )


class SafetensorsWriter:
    """Writes a file whose names, types and shapes are known, one tensor at a time in any order."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
        order = sorted(entries, key=lambda name: (_ORDER[_CODES[entries[name].dtype]], name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._entries: dict[str, Entry] = {}
        end = 0
        for name in order:
            entry = entries[name]._replace(start=end)
            end += entry.nbytes
            header[name] = {
                "dtype": _CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [entry.start, end],
            }
            self._entries[name] = entry
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._missing = set(order)
        self._file = open_binary(path, "wb", nbytes=end)
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._data_start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place; its type and shape are those announced."""
        entry = self._entries[name]
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise CheckpointError(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype}, announced as {entry.shape} {entry.dtype}"
            )
        self._file.seek(self._data_start + entry.start)
        write_tensor(self._file, tensor)
        self._missing.remove(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise CheckpointError(f"never written: {', '.join(sorted(self._missing))}")


def _parse_entry(name: str, item: Any, path: Path) -> Entry:
    try:
        dtype, shape, (start, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        sizes_fit = all(isinstance(size, int) and size >= 0 for size in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: header entry of {name} is damaged") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is of type {str(dtype)[:40]}", rule=f"one of {', '.join(DTYPES)}")
    entry = Entry(DTYPES[dtype], shape, start)
    if not sizes_fit or end - start != entry.nbytes:
        raise CheckpointError(f"{path}: header entry of {name}: shape, type and place do not agree")
    return entry
