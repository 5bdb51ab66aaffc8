"""Writing weights as Megatron's distributed checkpoint, tensor by tensor, in Megatron-Core's names and pieces."""

import io
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count, stored_parts, weight_named, weights
from nemo_minitron.checkpoints.megatron_weights import place_of
from nemo_minitron.checkpoints.parts import dtype_of
from nemo_minitron.checkpoints.source import TensorSource, stream
from nemo_minitron.checkpoints.torch_dist import TorchDistWriter


def write_weights(source: TensorSource, folder: Path, *, prefix: str, dtype: torch.dtype) -> None:
    """Write every weight of a source, one tensor in memory at a time. Equal sources give equal bytes.

    `prefix` stands before every key: "model." for NeMo 1, "module." for NeMo 2, "" for Megatron.
    """
    spec = source.spec
    with TorchDistWriter(folder, nbytes=parameter_count(spec) * dtype.itemsize) as writer:
        for name, tensor in stream(source):
            weight = weight_named(spec, name)
            place, parts = place_of(weight, spec, stacked=spec.is_uniform), stored_parts(weight, spec)
            pieces = torch.split(tensor.to(dtype_of(weight, dtype)), [shape[0] for shape in parts.values()])
            for suffix, piece in zip(parts, pieces, strict=True):
                if not place.leading:
                    writer.add(prefix + place.key + suffix, piece)
                    continue
                writer.add(
                    prefix + place.key + suffix,
                    piece[(None,) * len(place.leading)],
                    offsets=(*place.offsets, *(0 for _ in piece.shape)),
                    shape=(*place.leading, *piece.shape),
                )
        for key in extra_state_keys(spec, prefix=prefix):
            writer.add_object(key, _empty_state())


def extra_state_keys(spec: ModelSpec, *, prefix: str) -> Iterator[str]:
    """Keys of the empty per-layer states that Megatron-Core asks for beside each linear layer's weight."""
    for weight in weights(spec):
        module = weight.name.removesuffix(".weight")
        is_linear = module.rpartition(".")[2].startswith(("linear_", "in_proj", "out_proj"))
        if weight.layer is None or not is_linear or module == weight.name:
            continue
        place = place_of(weight, spec, stacked=spec.is_uniform)
        first, sizes = (".".join(map(str, numbers)) for numbers in (place.offsets or (0,), place.leading or (1,)))
        yield f"{prefix}{place.key.removesuffix('.weight')}._extra_state/shard_{first}_{sizes}"


def _empty_state() -> io.BytesIO:
    """No FP8 state, as Transformer Engine saves it: bytes that hold None."""
    state = io.BytesIO()
    torch.save(None, state)
    state.seek(0)
    return state
