"""Model weights and training states as Megatron distributed checkpoints, written at one layout and read at any other.

Weights lie in `<folder>/model_weights` under NeMo's names: `model.` and the canonical name, layers of one size stacked
on a leading axis, the vocabulary without padding. They are what `checkpoints` reads and writes without Megatron.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import stored_parts, weights
from nemo_minitron.checkpoints import digests
from nemo_minitron.checkpoints.megatron_weights import place_of
from nemo_minitron.errors import CheckpointError
from nemo_minitron.megatron import checkpoint_writer, param_gather, runtime
from nemo_minitron.megatron.checkpoint_writer import BackgroundWriter
from nemo_minitron.megatron.cpu import local_objects
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.optim import TrainOptimizer

WEIGHTS = "model_weights"
PREFIX = "model."


def save_weights(chunks: Sequence[nn.Module], folder: Path) -> None:
    """Write a model's weights to `<folder>/model_weights`, replacing what is there once the new ones are complete.

    Every rank calls it; all see the same file system.

    Raises:
        CheckpointError: They could not be written.
    """
    checkpoint_writer.write({"model": _model_state(chunks)}, folder / WEIGHTS)


def load_weights(chunks: Sequence[nn.Module], folder: Path) -> None:
    """Fill a model with the weights in `<folder>/model_weights`, converted to its numbers. Every rank calls it.

    Raises:
        CheckpointError: The folder is incomplete, or its weights are not exactly those of the model.
    """
    path = folder / WEIGHTS
    _check_complete(path)
    _check_names(path, unwrap(chunks[0]).spec)
    state = {"model": _model_state(chunks, extra_state=False)}
    _fill(chunks, _read(state, path)["model"])


def save_training(
    chunks: Sequence[nn.Module],
    optimizer: TrainOptimizer,
    folder: Path,
    *,
    common: dict[str, Any],
    background: BackgroundWriter | None = None,
) -> None:
    """Write all that a training run resumes from into a folder of its own, which appears when it is complete.

    The folder holds the digest of each of its files.

    Args:
        chunks: Wrapped chunks.
        optimizer: Their optimizer, with master weights, moments and schedule.
        folder: Replaced if it exists.
        common: Plain data, equal on all ranks.
        background: Who goes on writing after this returns; None to write here.

    Raises:
        CheckpointError: It could not be written.
    """
    model = _model_state(chunks)
    training = optimizer.sharded_state(model, _metadata(chunks), loading=False)
    state = {"model": model, "training": training, "common": common}
    if background is None:
        checkpoint_writer.write(state, folder, with_digests=True)
    else:
        background.begin(state, folder)


def load_training(chunks: Sequence[nn.Module], optimizer: TrainOptimizer, folder: Path) -> dict[str, Any]:
    """Take up what `save_training` wrote, at this or another layout; returns its `common`.

    Raises:
        CheckpointError: The folder is incomplete or belongs to another model.
    """
    _check_complete(folder)
    model = _model_state(chunks, extra_state=False)
    training = optimizer.sharded_state(model, _metadata(chunks), loading=True)
    loaded = _read({"model": model, "training": training}, folder)
    _fill(chunks, loaded["model"])
    optimizer.load_sharded_state(loaded["training"])
    return dict(loaded["common"])


def read_common(folder: Path) -> dict[str, Any]:
    """The `common` part of what `save_training` wrote, without any weight; every rank reads it by itself.

    Raises:
        CheckpointError: The folder is incomplete, or holds no training.
    """
    _check_complete(folder)
    with checkpoint_writer.errors_of(folder, "could not be read"):
        found = dist_checkpointing.load_common_state_dict(str(folder)).get("common")
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder}: holds no training", rule="a checkpoint that a training has written")
    return found


def _model_state(chunks: Sequence[nn.Module], *, extra_state: bool = True) -> dict[str, Any]:
    """The sharded state of each chunk under `chunk{i}`, its weights those of the latest step. Collective.

    Args:
        chunks: This rank's chunks.
        extra_state: Whether to keep the `_extra_state` entries of linears. They hold nothing we use; Megatron's strict
            loading expects to find them.
    """
    param_gather.finish(chunks)
    states: dict[str, Any] = {}
    for index, chunk in enumerate(map(unwrap, chunks)):
        state = chunk.sharded_state_dict(prefix=PREFIX, metadata=_metadata([chunk]))
        if not extra_state:
            state = {name: value for name, value in state.items() if "_extra_state" not in name}
        states[f"chunk{index}"] = {name: _without_padding(value, chunk.spec) for name, value in state.items()}
    return states


def _metadata(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    return {
        "dp_cp_group": runtime.current().groups.dp_cp,
        "non_homogeneous_layers": not unwrap(chunks[0]).spec.is_uniform,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def _without_padding(value: Any, spec: ModelSpec) -> Any:
    """A sharded vocabulary weight as a factory that stores its real rows and pads them with zeros when loading.

    A factory also serves the optimizer's states of the same weight.
    """
    if not isinstance(value, ShardedTensor) or not value.allow_shape_mismatch:
        return value
    exact = replace(value, allow_shape_mismatch=False)
    if value.global_shape[0] == spec.vocab_size:
        return exact
    start, rows = value.global_offset[0], value.local_shape[0]
    kept = min(rows, spec.vocab_size - start)

    def build(key: str, data: Tensor, replica_id: Any, *_: Any) -> list[ShardedTensor]:
        part = data[:kept]
        shape = (spec.vocab_size, *value.global_shape[1:])
        # Ranks hold unequal parts: no regular grid.
        grid: dict[str, Any] = {"local_shape": tuple(part.shape), "global_shape": shape, "axis_fragmentations": None}
        return [replace(exact, key=key, data=part, dtype=part.dtype, replica_id=replica_id, **grid)]

    def merge(parts: Any) -> Tensor:
        (part,) = parts
        return torch.cat([part, part.new_zeros(rows - kept, *part.shape[1:])])

    return ShardedTensorFactory(value.key, value.data, build, merge, value.replica_id)


def _fill(chunks: Sequence[nn.Module], loaded: dict[str, Any]) -> None:
    """Copy what was read into the model; every weight must be there.

    Transformer Engine's layers count an absent `_extra_state` as a missing weight. It belongs to fp8 and is not read.
    """
    for index, chunk in enumerate(map(unwrap, chunks)):
        state = {name.removeprefix(PREFIX): value for name, value in loaded[f"chunk{index}"].items()}
        missing, unexpected = chunk.load_state_dict(state, strict=False)
        if wrong := sorted(name for name in (*missing, *unexpected) if not name.endswith("_extra_state")):
            raise CheckpointError(
                f"{len(wrong)} name(s) of the checkpoint and the model differ: {', '.join(wrong[:8])}",
                rule="the checkpoint holds every weight of the model, and no other",
            )


def _read(state: dict[str, Any], path: Path) -> dict[str, Any]:
    with checkpoint_writer.errors_of(path, "could not be read"), local_objects():
        return dict(dist_checkpointing.load(state, str(path)))


def _check_complete(path: Path) -> None:
    """Make sure that a folder holds a complete torch_dist checkpoint."""
    marker = path / "metadata.json"
    digests.await_visible(marker, seconds=0 if runtime.current().rank == 0 else None)
    if not marker.is_file() or not (path / ".metadata").is_file():
        missing = marker.name if not marker.is_file() else ".metadata"
        raise CheckpointError(
            f"{path}: {missing} is missing", rule="a finished distributed checkpoint", remedy="it may be unfinished"
        )
    backend = json.loads(marker.read_text()).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(
            f"{path}: written as {backend!r}", rule="torch_dist", remedy="save it again with NeMo 2.0"
        )


def _check_names(path: Path, spec: ModelSpec) -> None:
    """Compare the names and shapes in a checkpoint with the model's, and list every difference at once."""
    found = {
        name: tuple(entry.size)
        for name, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wanted = stored_shapes(spec)
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not a weight of the model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {list(found[name])}, the model's is {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not belong to the model: " + "; ".join(sorted(problems)[:8]),
            rule=f"{len(wanted)} weights; {len(problems)} difference(s)",
        )


def stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights in `model_weights`; a uniform model's layers are stacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights(spec):
        place = place_of(weight, spec, stacked=spec.is_uniform)
        for suffix, shape in stored_parts(weight, spec).items():
            shapes[PREFIX + place.key + suffix] = place.leading + shape
    return shapes
