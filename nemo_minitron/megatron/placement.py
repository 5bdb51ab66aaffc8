"""Which part of a model lies on which rank: layers over pipeline stages, rows and columns over tensor ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_minitron.arch.axes import LAYER_AXES, Axis, Packing
from nemo_minitron.arch.layer import Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import Weight, part_shapes
from nemo_minitron.config.parallel import ParallelConfig, mamba_split
from nemo_minitron.errors import LayoutError


def check_layout(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Make sure that a model can be split so.

    Raises:
        LayoutError: Lists every size that does not fit.
    """
    problems: list[str] = []
    for index, layer in enumerate(spec.layers):
        where = "" if spec.is_uniform else f" of layer {index}"
        problems += [
            f"{row.size} = {layer.size(row)}{where} is not a multiple of "
            f"parallel.{row.divided_by} = {getattr(parallel, row.divided_by)}"
            for row in LAYER_AXES
            if row.divided_by and layer.size(row) % getattr(parallel, row.divided_by)
        ]
        if spec.is_uniform:
            break
    if parallel.expert > 1 and not spec.has_experts:
        problems.append(f"parallel.expert = {parallel.expert}, but the model has no experts")
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if chunks > spec.num_layers:
        problems.append(f"{spec.num_layers} layer(s) cannot fill {chunks} pipeline stages (parallel.pipeline)")
    if padded_vocab(spec, parallel.tensor) * (parallel.tensor - 1) // parallel.tensor >= spec.vocab_size:
        problems.append(f"vocab_size = {spec.vocab_size} is too small for parallel.tensor = {parallel.tensor}")
    problems += _mamba_problems(spec, parallel)
    if parallel.expert % parallel.context and parallel.context % parallel.expert:
        problems.append(
            f"parallel.expert = {parallel.expert} and parallel.context = {parallel.context}: one divides the other"
        )
    if problems:
        raise LayoutError(
            "the model cannot be split so: " + "; ".join(problems),
            rule="tensor parallelism divides KV groups, heads, Mamba groups and FFN, context parallelism Mamba heads, "
            "expert parallelism experts; every pipeline stage has a layer",
            remedy="choose other sizes under parallel:, or a target whose sizes are such multiples",
        )


def _mamba_problems(spec: ModelSpec, parallel: ParallelConfig) -> Iterator[str]:
    """Mixers whose heads cannot be shared out among context-parallel ranks."""
    told = set()
    for index, layer in enumerate(spec.layers):
        if not isinstance(mamba := layer.mixer, Mamba) or mamba.mamba_num_groups % parallel.tensor:
            continue
        groups = mamba.mamba_num_groups // parallel.tensor
        shares = mamba_split(groups, parallel.context)[1]
        sizes = mamba.mamba_num_heads, mamba.mamba_num_groups
        if mamba.mamba_num_heads // mamba.mamba_num_groups % shares and sizes not in told:
            told.add(sizes)
            yield (
                f"mamba_num_heads = {mamba.mamba_num_heads} of layer {index} is not a multiple of "
                f"{mamba.mamba_num_groups * shares}: under parallel.context = {parallel.context} {shares} ranks share "
                f"the heads of each Mamba group, {groups} of which are on a tensor-parallel rank"
            )


def padded_vocab(spec: ModelSpec, tensor: int) -> int:
    """Vocabulary rows that a model has in memory: every tensor-parallel rank holds equally many.

    The multiple is the largest power of two up to 128 that divides the vocabulary (NeMo's converters choose
    `make_vocab_size_divisible_by` so), times the tensor-parallel size; without tensor parallelism nothing is padded.
    """
    multiple = min(128, spec.vocab_size & -spec.vocab_size) * tensor
    return -(-spec.vocab_size // multiple) * multiple


def chunk_layers(num_layers: int, parallel: ParallelConfig) -> list[range]:
    """Layers of each model chunk in the order of the forward pass.

    Chunk `v * pipeline + p` is virtual stage `v` of pipeline rank `p`. Where layers do not divide evenly, the first
    chunks hold one more, since the last one also has the output layer.
    """
    count = parallel.pipeline * (parallel.virtual_pipeline or 1)
    fewest, more = divmod(num_layers, count)
    ends = [(index + 1) * fewest + min(index + 1, more) for index in range(count)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def state_holder(state: int, num_layers: int, parallel: ParallelConfig) -> int:
    """The pipeline rank that computes a state: what enters layer `state`, or what the final norm returns."""
    if state == num_layers:
        return parallel.pipeline - 1
    chunks = chunk_layers(num_layers, parallel)
    return next(index for index, layers in enumerate(chunks) if state in layers) % parallel.pipeline


def local_shard(weight: Weight, tensor: Tensor, spec: ModelSpec, *, rank: int, size: int) -> Tensor:
    """A tensor-parallel rank's part of a canonical tensor, in the layout of Megatron's modules.

    Rows of a QKV packing are split by KV group, the parts of a GATE_UP and of a Mamba packing one by one, and
    vocabulary rows after padding with zeros.
    """
    dim = weight.row.tensor_parallel_dim
    if dim is None:
        return tensor
    if weight.row.axes[0] is Axis.VOCAB:
        missing = padded_vocab(spec, size) - tensor.shape[0]
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
    if weight.row.packing not in (Packing.PLAIN, Packing.QKV):
        parts = torch.split(tensor, [shape[0] for shape in part_shapes(weight, spec)])
        return torch.cat([part.chunk(size)[rank] for part in parts])
    return tensor.chunk(size, dim=dim)[rank]
