"""Writing weights as Megatron's distributed checkpoint, tensor by tensor, in Megatron-Core's names and pieces."""

import io
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count, stored_parts, weight_named, weights
from nemo_minitron.checkpoints.megatron_weights import stacked_name
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
            parts = stored_parts(weight, spec)
            pieces = torch.split(tensor.to(dtype), [shape[0] for shape in parts.values()])
            for suffix, piece in zip(parts, pieces, strict=True):
                if weight.layer is None or not spec.is_uniform:
                    writer.add(prefix + name + suffix, piece)
                else:
                    writer.add(
                        prefix + stacked_name(name) + suffix,
                        piece[None],
                        offsets=(weight.layer, *(0 for _ in piece.shape)),
                        shape=(spec.num_layers, *piece.shape),
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
        if spec.is_uniform:
            yield f"{prefix}{stacked_name(module)}._extra_state/shard_{weight.layer}_{spec.num_layers}"
        else:
            yield f"{prefix}{module}._extra_state/shard_0_1"


def _empty_state() -> io.BytesIO:
    """No FP8 state, as Transformer Engine saves it: bytes that hold None."""
    state = io.BytesIO()
    torch.save(None, state)
    state.seek(0)
    return state
