"""Collectives named by what they do forward and backward. A group of None means "not split": they return their input.

Under tensor parallelism every rank holds the same loss and calls backward on its own copy. A value that is the same on
all ranks but used by each on its own shard receives a different gradient on each, so its gradient must be summed
(`identity_fwd_sum_bwd`); a sum over shards hands the same gradient back to each (`sum_fwd_identity_bwd`). With the
wrong one of the two, values stay right and gradients are off by up to the number of ranks.
"""

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, ReduceOp

from nemo_minitron.parallel.collectives import sum_over


def max_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Maximum of `x` over the ranks, on every rank; `x` is left unchanged. No gradient."""
    result = x.detach().clone()
    if group is not None:
        distributed.all_reduce(result, op=ReduceOp.MAX, group=group)
    return result


def sum_fwd_identity_bwd(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks; the gradient passes unchanged. For a partial value that becomes replicated."""
    return x if group is None else _SumForward.apply(x, group)


def identity_fwd_sum_bwd(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The value unchanged; the gradient is summed over the ranks. For a replicated value that each rank uses apart."""
    return x if group is None else _SumBackward.apply(x, group)


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return sum_over(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return sum_over(grad, ctx.group), None
