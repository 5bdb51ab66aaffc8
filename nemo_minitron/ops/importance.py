"""Importance of units from activations, forward only.

A site's activations are summed up in two steps, as in Muralidharan et al., arXiv:2407.14679, sec. 2.2: first over the
sequence, then over samples (the paper's "batch"). For a sample and a channel,

    m = mean |x|        n = sqrt(sum x^2)        v = mean (x - mean x)^2        over the kept positions of the sequence.

Over samples we keep the sum and the sum of squares of each: six numbers a channel from which all nine (batch,
sequence) aggregations follow later, and which add up over micro-batches, ranks and runs.

Shapes: S sequence, B samples of a micro-batch, C channels of a site, H query heads.
"""

from collections.abc import Sequence
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
    """Sums over kept positions of a sequence. Shards of a sequence (context parallelism) add up."""

    sums: Tensor
    """`[3, B, C]` float64: of |x|, of x^2, of x."""
    count: Tensor
    """`[B]` float64: kept positions of each sample."""

    def plus(self, other: "SequenceMoments") -> "SequenceMoments":
        """The moments of both shards together."""
        return SequenceMoments(self.sums + other.sums, self.count + other.count)

    def finish(self) -> Tensor:
        """m, n and v of every sample, `[3, B, C]`; zeros for a sample without kept positions."""
        abs_sum, square_sum, total = self.sums
        share_B1 = self.count.clamp_min(1).reciprocal()[:, None]
        variance = (square_sum * share_B1).sub_((total * share_B1).square_()).clamp_min_(0)
        return torch.stack([abs_sum * share_B1, square_sum.sqrt(), variance])

    @staticmethod
    def joined(sites: Sequence["SequenceMoments"]) -> "SequenceMoments":
        """The channels of several sites of the same samples side by side."""
        return SequenceMoments(torch.cat([site.sums for site in sites], -1), sites[0].count)


def sequence_moments(x_SBC: Tensor, keep_BS: Tensor | None = None) -> SequenceMoments:
    """Sum a site's activations over the sequence.

    Single products are float32 (float64 for float64 input), sums of more than some hundred terms float64. The variance
    is the difference of two moments, so its relative error is about 1e-7 times `1 + mean^2 / variance`.

    Args:
        x_SBC: Activations; left unchanged. Whatever stands at masked positions, NaN included, has no effect.
        keep_BS: True where a position counts; None keeps all, which is faster.
    """
    size, samples, channels = x_SBC.shape
    width = samples * channels
    wide = torch.float64 if x_SBC.dtype == torch.float64 else torch.float32
    rows = max(1, min(size, _BLOCK_ELEMENTS // max(1, width)))
    buffer = torch.empty((rows, width), dtype=wide, device=x_SBC.device)
    starts = range(0, size, rows)
    parts_3PD = torch.zeros((3, len(starts), width), dtype=wide, device=x_SBC.device)
    for index, start in enumerate(starts):
        x_RD = x_SBC[start : start + rows].reshape(-1, width)
        block_RD = buffer[: x_RD.shape[0]]
        if x_RD.dtype != wide or keep_BS is not None:
            x_RD = block_RD.copy_(x_RD)
        if keep_BS is not None:
            dropped_RB1 = ~keep_BS[:, start : start + rows].t().unsqueeze(-1)
            block_RD.view(-1, samples, channels).masked_fill_(dropped_RB1, 0)
        torch.sum(x_RD, 0, out=parts_3PD[2, index])
        torch.sum(torch.abs(x_RD, out=block_RD), 0, out=parts_3PD[0, index])
        torch.sum(block_RD.mul_(block_RD), 0, out=parts_3PD[1, index])
    if keep_BS is None:
        count_B = torch.full((samples,), size, dtype=torch.float64, device=x_SBC.device)
    else:
        count_B = keep_BS.sum(-1, dtype=torch.float64)
    return SequenceMoments(parts_3PD.sum(1, dtype=torch.float64).view(3, samples, channels), count_B)


@dataclass(slots=True)
class SiteSums:
    """Sums over samples, `[6, C]` float64 in the order of `ROWS`. Two of them add up."""

    values: Tensor

    ROWS = tuple(f"{statistic}.{kind}" for statistic in Aggregation for kind in ("sum", "sumsq"))

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> "SiteSums":
        """Nothing summed yet."""
        return cls(torch.zeros(6, channels, dtype=torch.float64, device=device))

    def add_(self, moments: SequenceMoments) -> None:
        """Add the samples of a micro-batch. Samples without kept positions add nothing."""
        statistics_3BC = moments.finish()
        self.values[0::2] += statistics_3BC.sum(1)
        self.values[1::2] += statistics_3BC.square_().sum(1)

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
