"""GGUF files, complete or in parts, as tensors and metadata; every key once, every part there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.errors import CheckpointError

_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_LONGEST_ROW = 1 << 13  # bytes; 16 of them and their fp32 values stay in the processor's cache


class GgufFile:
    """A GGUF file with all its parts.

    Attributes:
        parts: Paths of the files, in order.
        tensors: Every tensor of all parts by name, as the gguf package has it.

    Raises:
        CheckpointError: It is damaged, a key or tensor is there twice, it is not the first of its parts, or a part is
            missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self._fields = reader.fields
        self.parts = (path, *self._other_parts())
        self.tensors: dict[str, Any] = {}
        for number, part in enumerate(self.parts):
            opened = reader if number == 0 else _open(part)
            if number and (found := _value(opened.fields, "split.no", None)) != number:
                raise CheckpointError(f"{part}: split.no = {found}", rule=f"{number}, by its name")
            for tensor in opened.tensors:
                if tensor.name in self.tensors:
                    raise CheckpointError(f"{part}: {tensor.name} lies in another part too", rule="one place a tensor")
                self.tensors[tensor.name] = tensor
        total = self.field("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise CheckpointError(f"{path}: split.tensors.count = {total}, but there are {len(self.tensors)} tensors")

    def field(self, key: str, default: Any) -> Any:
        """A value of the metadata; `default` where there is no such key."""
        return _value(self._fields, key, default)

    def names(self) -> tuple[str, ...]:
        """Keys of the metadata."""
        return tuple(key for key in self._fields if not key.startswith("GGUF."))

    def tensor(self, name: str) -> Tensor:
        """A tensor in fp32.

        The package works on 16 rows at a time, which is too little for its overhead: it is handed fewer and longer rows
        (blocks know nothing of rows), and plain arrays, because slicing a memory map costs more than the arithmetic.

        Raises:
            CheckpointError: It is of a type that the gguf package cannot expand.
        """
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        data = np.asarray(tensor.data).view(np.ndarray)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        rows = data.shape[0] if data.ndim > 1 else 1
        joined = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * data[0].nbytes <= _LONGEST_ROW))
        try:
            values = dequantize(data.reshape(rows // joined, -1), tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {name} is of type {tensor.tensor_type.name}, which the gguf package does not expand",
                remedy="import a file of another quantisation, or the Hugging Face checkpoint of this model",
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))

    def _other_parts(self) -> list[Path]:
        """Paths of the parts behind the first."""
        count, number = self.field("split.count", 0), self.field("split.no", 0)
        if type(count) is not int or type(number) is not int:
            raise CheckpointError(f"{self.path}: split.no = {str(number)[:40]} of split.count = {str(count)[:40]}")
        if count in (0, 1) and number == 0:
            return []
        match = _PART.match(self.path.name)
        if number != 0:
            first = f"{match['stem']}-00001-of-{match['count']}.gguf" if match else "the one of split.no = 0"
            raise CheckpointError(
                f"{self.path}: part {number + 1} of {count} (split.no = {number})",
                rule="a split file is named by its first part, which holds the metadata",
                remedy=f"name {first}",
            )
        if match is None or int(match["number"]) != 1 or int(match["count"]) != count:
            raise CheckpointError(
                f"{self.path}: part 1 of {count} (split.count = {count}), by its name none",
                rule=f"NAME-00001-of-{count:05}.gguf, so that the other parts can be found",
                remedy="rename the parts as they were",
            )
        others = [self.path.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in range(2, count + 1)]
        if absent := [part.name for part in others if not part.is_file()]:
            raise CheckpointError(
                f"{self.path}: part 1 of {count} (split.count = {count}); {absent[0]} is missing",
                rule="all parts of a split file lie in one folder",
                remedy="fetch the other parts too",
            )
        return others


def _value(fields: Mapping[str, Any], key: str, default: Any) -> Any:
    field = fields.get(key)
    if field is None:
        return default
    try:
        return field.contents()
    except Exception as error:  # whatever the package raises on bytes that are no text, or lists without an end
        raise CheckpointError(f"GGUF key {key} cannot be read ({error})", remedy="damaged? fetch it again") from error


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    twice = f"{path}: key {{}} is there twice"
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader raises whatever numpy or struct do on a damaged file
        if match := re.search(r"Duplicate (\S+) already", str(error)):
            raise CheckpointError(twice.format(match[1]), rule="every key once, as llama.cpp demands") from error
        raise CheckpointError(
            f"{path}: not a sound GGUF file ({type(error).__name__}: {error})", remedy="truncated? fetch it again"
        ) from error
    for name, field in reader.fields.items():
        if name != field.name:  # the reader keeps the second of two under another name
            raise CheckpointError(twice.format(field.name), rule="every key once, as llama.cpp demands")
    return reader
