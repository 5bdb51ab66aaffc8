"""Fused canonical weights and the separate parts that other formats store: q, k, v and gate, up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_minitron.arch.axes import Packing
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import Weight, packed_groups, part_shapes
from nemo_minitron.ops.packing import merge_gate_up, merge_qkv, split_gate_up, split_qkv


def fuse(parts: Sequence[Tensor], weight: Weight, spec: ModelSpec) -> Tensor:
    """One canonical tensor from its parts, contiguous."""
    match weight.row.packing:
        case Packing.PLAIN:
            (only,) = parts
            return only.contiguous()
        case Packing.QKV:
            query, key, value = parts
            groups = packed_groups(weight, spec)
            return merge_qkv(query, key, value, num_groups=groups, head_dim=spec.head_dim)
        case Packing.GATE_UP:
            gate, up = parts
            return merge_gate_up(gate, up)
        case Packing.MAMBA_IN | Packing.MAMBA_CONV:
            return torch.cat(list(parts))


def split(tensor: Tensor, weight: Weight, spec: ModelSpec) -> tuple[Tensor, ...]:
    """The parts of a canonical tensor; `fuse` is the inverse."""
    match weight.row.packing:
        case Packing.PLAIN:
            return (tensor,)
        case Packing.QKV:
            groups = packed_groups(weight, spec)
            return split_qkv(tensor, num_groups=groups, head_dim=spec.head_dim)
        case Packing.GATE_UP:
            return split_gate_up(tensor)
        case Packing.MAMBA_IN | Packing.MAMBA_CONV:
            return torch.split(tensor, [shape[0] for shape in part_shapes(weight, spec)])


def stored_shapes(weight: Weight, spec: ModelSpec, *, tensors: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a weight in a format that keeps its parts in so many tensors: one each, or all in one."""
    shapes = part_shapes(weight, spec)
    return shapes if tensors == len(shapes) else (weight.shape,)


def fuse_stored(tensors: Sequence[Tensor], weight: Weight, spec: ModelSpec) -> Tensor:
    """One canonical tensor from `stored_shapes`; several parts in one tensor lie one below the other (q, k, v)."""
    shapes = part_shapes(weight, spec)
    if len(tensors) < len(shapes):
        (stacked,) = tensors
        tensors = torch.split(stacked, [shape[0] for shape in shapes])
    return fuse(tensors, weight, spec)


def split_stored(tensor: Tensor, weight: Weight, spec: ModelSpec, *, tensors: int) -> tuple[Tensor, ...]:
    """A canonical tensor as a format with so many tensors stores it; `fuse_stored` is the inverse."""
    parts = split(tensor, weight, spec)
    return parts if tensors == len(parts) else (torch.cat(parts),)


def dtype_of(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    """Type of a weight in a checkpoint of a type: a few are fp32 in every model."""
    return torch.float32 if weight.row.fp32 else dtype


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The type that holds every value of all of them exactly."""
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found
