"""Which files of a Hugging Face folder hold its weights, and which of them holds each weight.

The rule is that of transformers: `model.safetensors`, else the shards of `model.safetensors.index.json`, else
`pytorch_model.bin`, else the shards of its index. Two sets of one kind that are not the same are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.files import FolderFiles
from nemo_minitron.checkpoints.pickles import TensorHeader
from nemo_minitron.checkpoints.plain_data import read_json
from nemo_minitron.checkpoints.safetensors_file import Entry, SafetensorsFile
from nemo_minitron.checkpoints.torch_file import TorchFile
from nemo_minitron.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BIN_INDEX = "pytorch_model.bin.index.json"
_BIN = "pytorch_model.bin"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

WeightFile = SafetensorsFile | TorchFile


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a file, and its name there."""

    file: WeightFile
    name: str
    part: tuple[int, int, int] | None = None
    """Of a stored tensor `[experts, rows, columns]`: which expert, and its rows from and up to."""

    @property
    def entry(self) -> Entry | TensorHeader:
        """Its type and shape."""
        entry = self.file.entries[self.name]
        if self.part is None:
            return entry
        _, first, last = self.part
        return Entry(entry.dtype, (last - first, *entry.shape[2:]))

    def get(self) -> Tensor:
        """The tensor."""
        if self.part is None:
            return self.file.get(self.name)
        expert, first, last = self.part
        if isinstance(self.file, SafetensorsFile):
            return self.file.get_rows(self.name, expert, first, last)
        return self.file.get(self.name)[expert, first:last].clone()

    def same_as(self, other: "Place") -> bool:
        """Whether both hold the same values in the same type. Reads them unless they are the same bytes of a file."""
        mine, theirs = self.entry, other.entry
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            return False
        headers = isinstance(mine, TensorHeader) and isinstance(theirs, TensorHeader)
        if self.file is other.file and headers and mine == theirs:
            return True
        return torch.equal(self.get(), other.get())


class HfWeights:
    """The weights of a Hugging Face folder by their names.

    Attributes:
        places: Where each lies.
        files: Names of the files that are read.
        kind: What these files are.
        unread: Names of other files of weights in the folder.

    Raises:
        CheckpointError: There are none, a file is missing or damaged, an index does not describe its shards, two sets
            of files could be meant, or one weight lies in two files with different values.
    """

    def __init__(self, folder: Path) -> None:
        files, index, weight_map = _open(folder)
        self.files = tuple(files)
        self.kind = "safetensors" if next(iter(files)).endswith(".safetensors") else "files of torch.save"
        self.places: dict[str, Place] = {}
        for file, opened in files.items():
            for name in opened.entries:
                place = Place(opened, name)
                if name in self.places and not self.places[name].same_as(place):
                    first = next(other for other in files if files[other] is self.places[name].file)
                    raise CheckpointError(
                        f"{folder}: {name} lies in {first} and in {file}, with different values",
                        rule="one value for a weight",
                        remedy="shards of two saves? fetch or save the folder again",
                    )
                self.places.setdefault(name, place)
        for name, file in weight_map.items():
            if name not in files[file].entries:
                raise CheckpointError(f"{folder / file}: has no {name}, though {index} says so")
        self.unread = tuple(
            sorted(
                path.name
                for path in folder.iterdir()
                if path.suffix in _WEIGHT_SUFFIXES and path.name not in files and path.name != "training_args.bin"
            )
        )


def _open(folder: Path) -> tuple[Mapping[str, WeightFile], str, Mapping[str, str]]:
    """Files by name, the name of their index, and what it says."""
    if found := _listed(folder, INDEX, SINGLE):
        names, weight_map = found
        return {name: SafetensorsFile(folder / name) for name in names}, INDEX, weight_map
    if found := _listed(folder, _BIN_INDEX, _BIN):
        names, weight_map = found
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: no such file")
        whole = FolderFiles(folder)
        return {name: TorchFile(whole, name) for name in names}, _BIN_INDEX, weight_map
    raise CheckpointError(
        f"{folder}: no {SINGLE}, {_BIN} or an index of either",
        rule="weights as safetensors, or in the files of torch.save",
    )


def _listed(folder: Path, index: str, single: str) -> tuple[list[str], dict[str, str]] | None:
    """Names of the files of weights, and which of them holds each weight; None when neither file is there."""
    if not (folder / index).is_file():
        return ([single], {}) if (folder / single).is_file() else None
    weight_map = read_json((folder / index).read_bytes(), where=str(folder / index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index}: has no weight_map")
    names = sorted({_plain_name(name, folder / index) for name in weight_map.values()})
    if (folder / single).is_file() and names != [single]:
        raise CheckpointError(
            f"{folder}: {single} and {index} (of {names[0]} and others) both hold a model",
            rule=f"one set of weights; transformers takes {single} and overlooks the index",
            remedy="remove the one that is old",
        )
    return names, weight_map


def _plain_name(name: Any, index: Path) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{index}: {name!r} is not the name of a file in this folder")
    return name
