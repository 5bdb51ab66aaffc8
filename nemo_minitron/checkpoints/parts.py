"""Fused canonical weights and the separate parts that other formats store: q, k, v and gate, up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_minitron.arch.axes import Packing
from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.arch.weights import Weight
from nemo_minitron.ops.packing import merge_gate_up, merge_qkv, split_gate_up, split_qkv


def part_shapes(weight: Weight, spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Shapes of a weight's parts in packing order (q, k, v or gate, up); one shape for a plain weight."""
    rest = weight.shape[1:]
    match weight.row.packing:
        case Packing.PLAIN:
            return (weight.shape,)
        case Packing.QKV:
            layer = _layer(weight, spec)
            query, key = layer.num_attention_heads * spec.head_dim, layer.num_query_groups * spec.head_dim
            return (query, *rest), (key, *rest), (key, *rest)
        case Packing.GATE_UP:
            return ((weight.shape[0] // 2, *rest),) * 2


def fuse(parts: Sequence[Tensor], weight: Weight, spec: ModelSpec) -> Tensor:
    """One canonical tensor from its parts, contiguous."""
    match weight.row.packing:
        case Packing.PLAIN:
            (only,) = parts
            return only.contiguous()
        case Packing.QKV:
            query, key, value = parts
            groups = _layer(weight, spec).num_query_groups
            return merge_qkv(query, key, value, num_groups=groups, head_dim=spec.head_dim)
        case Packing.GATE_UP:
            gate, up = parts
            return merge_gate_up(gate, up)


def split(tensor: Tensor, weight: Weight, spec: ModelSpec) -> tuple[Tensor, ...]:
    """The parts of a canonical tensor; `fuse` is the inverse."""
    match weight.row.packing:
        case Packing.PLAIN:
            return (tensor,)
        case Packing.QKV:
            groups = _layer(weight, spec).num_query_groups
            return split_qkv(tensor, num_groups=groups, head_dim=spec.head_dim)
        case Packing.GATE_UP:
            return split_gate_up(tensor)


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


def _layer(weight: Weight, spec: ModelSpec) -> LayerSpec:
    if weight.layer is None:
        raise AssertionError(f"{weight.name} is packed but belongs to no layer")
    return spec.layers[weight.layer]


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The type that holds every value of all of them exactly."""
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found
