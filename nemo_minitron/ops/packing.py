"""Fused weights: how query, key and value, and gate and up, lie in one tensor, and which rows belong to what.

Canonical (Megatron) order along dimension 0. QKV: for each KV group its query heads, then its key, then its value,
`head_dim` rows each. Gated MLP: all gate rows, then all up rows. Everything works on weights `[rows, h]` and biases
`[rows]` alike, and on a tensor-parallel shard that holds complete groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_minitron.ops.memory import empty


def split_qkv(qkv: Tensor, *, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take a fused QKV apart; `merge_qkv` is the inverse.

    Returns:
        Query `[num_heads * head_dim, ...]` in global head order, key and value `[num_groups * head_dim, ...]`.
    """
    grouped = _by_group(qkv, num_groups, head_dim)
    query, key, value = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def merge_qkv(query: Tensor, key: Tensor, value: Tensor, *, num_groups: int, head_dim: int) -> Tensor:
    """Fuse query, key and value (as `split_qkv` returns them) into one tensor."""
    rows = sum(len(part) for part in (query, key, value))
    fused = empty((rows, *query.shape[1:]), query.dtype)
    parts = [_by_group(part, num_groups, head_dim) for part in (query, key, value)]
    torch.cat(parts, dim=1, out=_by_group(fused, num_groups, head_dim))
    return fused


def split_gate_up(fc1: Tensor) -> tuple[Tensor, Tensor]:
    """Gate rows and up rows of a gated MLP's first weight or bias (views)."""
    gate, up = fc1.chunk(2, dim=0)
    return gate, up


def merge_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """One tensor: gate rows, then up rows."""
    fused = empty((len(gate) + len(up), *gate.shape[1:]), gate.dtype)
    return torch.cat([gate, up], out=fused)


def head_channels(heads: Tensor, *, head_dim: int) -> Tensor:
    """Columns of the attention output projection that belong to query `heads` (global indices), in that order."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def qkv_rows(heads: Tensor, groups: Tensor, *, num_heads: int, num_groups: int, head_dim: int) -> Tensor:
    """Rows of a fused QKV weight that belong to the kept heads and groups, in packed order.

    Slicing with them gives the fused QKV weight of the smaller model: for each kept group its kept query heads (in the
    order given), its key, its value.

    Heads and groups are those that are kept, by their numbers before pruning; every kept head belongs to a kept
    group.
    """
    per_group = num_heads // num_groups
    slots = []  # a slot is head_dim rows: [q ... q, k, v] per group
    for group in groups.tolist():
        first = group * (per_group + 2)
        slots.append(first + heads[heads // per_group == group] % per_group)
        slots.append(torch.tensor([first + per_group, first + per_group + 1]))
    packed = torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)
    return head_channels(packed, head_dim=head_dim)


def gate_up_rows(kept: Tensor, *, neurons: int) -> Tensor:
    """Rows of a gated MLP's first weight that belong to the `kept` ones of its `neurons`: gate rows, then up rows."""
    return torch.cat([kept, kept + neurons])


def crossed(outer: Tensor, inner: Tensor, *, size: int) -> Tensor:
    """Indices of all pairs of kept units, `outer * size + inner`, in the order of the first and then the second."""
    return (outer[:, None] * size + inner).flatten()


def part_rows(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Rows that stay of a weight whose parts lie one below the other: of each part, its rows and which of them stay."""
    first, found = 0, []
    for rows, kept in parts:
        found.append(kept + first)
        first += rows
    return torch.cat(found)


def _by_group(rows: Tensor, num_groups: int, head_dim: int) -> Tensor:
    return rows.reshape(num_groups, -1, head_dim, *rows.shape[1:])
