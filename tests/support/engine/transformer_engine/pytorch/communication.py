"""Collectives over a tensor- or context-parallel group, with their gradients.

All are made of all-gather and all-reduce, which Gloo has. A group of one rank, or None, leaves tensors as they are.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """The parts of all ranks one after the other on the first dimension."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def own_part(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's part of the first dimension."""
    return x.chunk(group.size())[group.rank()].contiguous()


class Gather(torch.autograd.Function):
    """All-gather; backward, reduce-scatter. In front of a column-parallel product under sequence parallelism."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own_part(summed(grad, ctx.group), ctx.group), None


class ReduceScatter(torch.autograd.Function):
    """Reduce-scatter; backward, all-gather. Behind a row-parallel product under sequence parallelism."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return own_part(summed(x, group), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad, ctx.group), None


class AllReduce(torch.autograd.Function):
    """All-reduce; backward, nothing. Behind a row-parallel product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Copy(torch.autograd.Function):
    """Nothing; backward, all-reduce. In front of a column-parallel product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None
