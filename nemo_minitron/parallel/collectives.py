"""Collectives named by what they do forward and backward. A group of None means "not split": they return their input.

Under tensor parallelism every rank holds the same loss and calls backward on its own copy. A value that is the same on
all ranks but used by each on its own shard receives a different gradient on each, so its gradient must be summed
(`identity_fwd_sum_bwd`); a sum over shards hands the same gradient back to each (`sum_fwd_identity_bwd`). With the
wrong one of the two, values stay right and gradients are off by up to the number of ranks.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, ReduceOp

from nemo_minitron.ops import autograd


def split_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group, or None if it has a single rank: then nothing is split and no collective is worth calling."""
    return None if group is None or distributed.get_world_size(group) == 1 else group


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks; 1 when not split."""
    return 1 if group is None else distributed.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """This rank's place in the group; 0 when not split."""
    return 0 if group is None else distributed.get_rank(group)


def sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of `x` over the ranks, on every rank; `x` is left unchanged. No gradient."""
    return _reduced(x, group, ReduceOp.SUM)


def max_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Maximum of `x` over the ranks, on every rank; `x` is left unchanged. No gradient."""
    return _reduced(x, group, ReduceOp.MAX)


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`[ranks, ...]`: `x` of every rank in rank order (shapes are equal), on every rank. No gradient."""
    if group is None:
        return x.detach().unsqueeze(0)
    source = x.detach().contiguous()
    parts = [torch.empty_like(source) for _ in range(group_size(group))]
    distributed.all_gather(parts, source, group=group)
    return torch.stack(parts)


def sum_fwd_identity_bwd(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks; the gradient passes unchanged. For a partial value that becomes replicated."""
    if group is None:
        return x
    result: Tensor = autograd.apply(_SumForward, x, group)
    return result


def identity_fwd_sum_bwd(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The value unchanged; the gradient is summed over the ranks. For a replicated value that each rank uses apart."""
    if group is None:
        return x
    result: Tensor = autograd.apply(_SumBackward, x, group)
    return result


def _reduced(x: Tensor, group: ProcessGroup | None, how: Any) -> Tensor:
    if group is None:
        return x.detach()
    result = x.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(result, op=how, group=group)
    return result


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_over(grads[0], ctx.group), None
