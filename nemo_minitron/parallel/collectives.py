"""Collectives without gradients. A group of None means "not split": they return their input."""

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


def split_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group, or None if it has a single rank: then nothing is split and no collective is worth calling."""
    return None if group is None or distributed.get_world_size(group) == 1 else group


def group_rank(group: ProcessGroup | None) -> int:
    """This rank's place in the group; 0 when not split."""
    return 0 if group is None else distributed.get_rank(group)


def sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of `x` over the ranks, on every rank; `x` is left unchanged."""
    if group is None:
        return x.detach()
    result = x.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(result, group=group)
    return result


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`[ranks, ...]`: `x` of every rank in rank order (shapes are equal), on every rank."""
    if group is None:
        return x.detach().unsqueeze(0)
    source = x.detach().contiguous()
    parts = [torch.empty_like(source) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, source, group=group)
    return torch.stack(parts)
