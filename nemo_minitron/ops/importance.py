"""Importance of units from activations, forward only.

A site's activations are summed up in two steps, as in Muralidharan et al., arXiv:2407.14679, sec. 2.2: first over the
sequence, then over samples (the paper's "batch"). For a sample and a channel,

    m = mean |x|        n = sqrt(sum x^2)        v = mean (x - mean x)^2        over the kept positions of the sequence.

Over samples we keep the sum and the sum of squares of each: six numbers a channel from which all nine (batch,
sequence) aggregations follow later, and which add up over micro-batches, ranks and runs.

Shapes: S sequence, B samples of a micro-batch, C channels of a site, H query heads.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

# Size of the float32 block that is summed before float64 takes over; at 1 MiB it stays in second-level cache.
_BLOCK_ELEMENTS = 1 << 18


class Aggregation(StrEnum):
    """How a statistic of single samples becomes one number: mean, root of the sum of squares, or variance."""

    MEAN = "mean"
    L2 = "l2"
    VAR = "var"


@dataclass(frozen=True, slots=True)
class SequenceMoments:
    """Sums over kept positions of a sequence, float64. Shards of a sequence (context parallelism) add up."""

    abs_sum: Tensor
    """`[B, C]`, like the next two."""
    square_sum: Tensor
    sum: Tensor
    count: Tensor
    """`[B]`: kept positions of each sample."""

    def plus(self, other: "SequenceMoments") -> "SequenceMoments":
        """The moments of both shards together."""
        return SequenceMoments(
            self.abs_sum + other.abs_sum,
            self.square_sum + other.square_sum,
            self.sum + other.sum,
            self.count + other.count,
        )

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """`m, n, v` of every sample, each `[B, C]`; zeros for a sample without kept positions."""
        count_B1 = self.count.clamp_min(1)[:, None]
        mean_BC = self.sum / count_B1
        var_BC = (self.square_sum / count_B1 - mean_BC.square()).clamp_min(0)
        return self.abs_sum / count_B1, self.square_sum.sqrt(), var_BC


def sequence_moments(x_SBC: Tensor, keep_BS: Tensor | None = None) -> SequenceMoments:
    """Sum a site's activations over the sequence.

    Single products are float32 (float64 for float64 input), sums of more than some hundred terms float64. The variance
    is the difference of two moments, so its relative error is about 1e-7 times `1 + mean^2 / variance`.

    Args:
        x_SBC: Activations; left unchanged. Whatever stands at masked positions, NaN included, has no effect.
        keep_BS: True where a position counts; None keeps all, which is faster.
    """
    size, samples, channels = x_SBC.shape
    if keep_BS is None:
        count_B = torch.full((samples,), size, dtype=torch.float64, device=x_SBC.device)
    else:
        count_B = keep_BS.sum(-1, dtype=torch.float64)
    wide = torch.float64 if x_SBC.dtype == torch.float64 else torch.float32
    rows = max(1, min(size, _BLOCK_ELEMENTS // max(1, samples * channels)))
    sums_3BC = x_SBC.new_zeros((3, samples, channels), dtype=torch.float64)
    block_SBC = torch.empty((rows, samples, channels), dtype=wide, device=x_SBC.device)
    for start in range(0, size, rows):
        part = x_SBC[start : start + rows]
        block = block_SBC[: part.shape[0]].copy_(part)
        if keep_BS is not None:
            block.masked_fill_(~keep_BS[:, start : start + rows].t().unsqueeze(-1), 0)
        sums_3BC[2] += block.sum(0)
        sums_3BC[0] += block.abs_().sum(0)
        sums_3BC[1] += block.mul_(block).sum(0)
    return SequenceMoments(sums_3BC[0], sums_3BC[1], sums_3BC[2], count_B)


@dataclass(slots=True)
class SiteSums:
    """Sums over samples of one site, `[6, C]` float64 in the order of `ROWS`. Two of them add up."""

    values: Tensor

    ROWS = tuple(f"{statistic}.{kind}" for statistic in Aggregation for kind in ("sum", "sumsq"))

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> "SiteSums":
        """Nothing summed yet."""
        return cls(torch.zeros(6, channels, dtype=torch.float64, device=device))

    def add_(self, moments: SequenceMoments) -> None:
        """Add the samples of a micro-batch. Samples without kept positions add nothing."""
        for index, statistic_BC in enumerate(moments.finish()):
            self.values[2 * index] += statistic_BC.sum(0)
            self.values[2 * index + 1] += statistic_BC.square().sum(0)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The six vectors as `{prefix}.{mean|l2|var}.{sum|sumsq}`."""
        return {f"{prefix}.{row}": vector for row, vector in zip(self.ROWS, self.values, strict=True)}


def aggregate(sum_C: Tensor, sumsq_C: Tensor, samples: Tensor | float, how: Aggregation | str) -> Tensor:
    """Importance of each channel from the two sums of one statistic over `samples` samples; float64 `[C]`.

    MEAN is `sum / samples` (the statistics are never negative), L2 `sqrt(sumsq)`, VAR the variance over samples with
    divisor `samples`. Default of the method: statistic "mean", how "l2". Source: arXiv:2407.14679, sec. 2.2.
    """
    count = torch.as_tensor(samples, dtype=torch.float64).clamp_min(1)
    match Aggregation(how):
        case Aggregation.MEAN:
            return sum_C / count
        case Aggregation.L2:
            return sumsq_C.sqrt()
        case Aggregation.VAR:
            return (sumsq_C / count - (sum_C / count).square()).clamp_min(0)


def head_importance(channel_importance: Tensor, *, head_dim: int) -> Tensor:
    """L2 over each query head's channels: `[H * head_dim]` to `[H]`."""
    per_head: Tensor = torch.linalg.vector_norm(channel_importance.reshape(-1, head_dim), dim=-1)
    return per_head


def kv_group_importance(head_importance_H: Tensor, *, num_groups: int) -> Tensor:
    """Sum over the query heads of each KV group: `[H]` to `[num_groups]`."""
    return head_importance_H.reshape(num_groups, -1).sum(-1)
