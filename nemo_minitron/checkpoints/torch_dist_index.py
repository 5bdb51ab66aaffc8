"""The index of a torch_dist folder as checked, plain data: which stretch of which file holds which box of a tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from nemo_minitron.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor and the record that holds it."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the pieces that make it up."""

    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def stored_tensors(index: Metadata, *, label: str) -> dict[str, StoredTensor]:
    """Tensors of an index by key; other objects are left out, and so is what belongs to a training, not to a model.

    Raises:
        CheckpointError: An entry is damaged, a piece lies outside its tensor or is larger than its record, or
            the pieces do not add up to their tensor.
    """
    found = {}
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not is_training_state(str(key)):
            try:
                found[str(key)] = _stored_tensor(key, entry, index.storage_data)
            except (AttributeError, TypeError, ValueError, KeyError) as error:
                what = f"{label}/.metadata: entry of {key} is damaged ({type(error).__name__}: {error})"
                raise CheckpointError(what, remedy="fetch or write it again") from error
    return found


def is_training_state(key: str) -> bool:
    """Whether a key belongs to an optimizer, a schedule or random states, not to the model."""
    return key.startswith(("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler"))


def check_files(tensors: Mapping[str, StoredTensor], sizes: Mapping[str, int], *, label: str) -> None:
    """Compare the pieces with the files that are there.

    Raises:
        CheckpointError: A file is missing or too short.
    """
    for key, tensor in tensors.items():
        for piece in tensor.pieces:
            if piece.file not in sizes:
                raise CheckpointError(f"{label}: {piece.file} is missing", rule=f"it holds a piece of {key}")
            if piece.start + piece.length > sizes[piece.file]:
                raise CheckpointError(
                    f"{label}: {piece.file} is truncated at {sizes[piece.file]} bytes",
                    remedy="fetch or write it again",
                )


def _stored_tensor(key: str, entry: Any, places: Mapping[Any, Any]) -> StoredTensor:
    shape, dtype = _shape(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype) or not shape:
        raise ValueError(f"type {dtype}, shape {shape}")
    pieces = []
    for chunk in entry.chunks:
        offsets, sizes = _shape(chunk.offsets), _shape(chunk.sizes)
        place = places[MetadataIndex(key, offsets)]
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"stored through {place.transform_descriptors}")
        start, length = _shape((place.offset, place.length))
        inside = all(low + size <= whole for low, size, whole in zip(offsets, sizes, shape, strict=True))
        if not inside or prod(sizes) * dtype.itemsize > length:
            raise ValueError(f"a piece at {offsets}, shaped {sizes}, in {length} bytes")
        pieces.append(Piece(offsets, sizes, str(place.relative_path), start, length))
    if sum(prod(piece.sizes) for piece in pieces) != prod(shape):
        raise ValueError(f"its pieces do not add up to {shape}")
    return StoredTensor(shape, dtype, tuple(pieces))


def _shape(values: Any) -> Shape:
    found = tuple(values)
    if not all(type(value) is int and value >= 0 for value in found):
        raise ValueError(f"{found} are not sizes")
    return found
