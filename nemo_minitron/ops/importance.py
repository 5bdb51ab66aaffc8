"""Importance of units from activations, forward only.

A site's activations are summed up in two steps, as in Muralidharan et al., arXiv:2407.14679, sec. 2.2: first over the
sequence, then over samples (the paper's "batch"). For a sample and a channel,

    m = mean |x|        n = sqrt(sum x^2)        v = mean (x - mean x)^2        over the kept positions of the sequence.

Over samples we keep the sum and the sum of squares of each: six numbers per channel from which all nine (batch,
sequence) aggregations follow later, and which add up over micro-batches, ranks and runs.

Shapes: S sequence, B samples of a micro-batch, C channels of a site, H query heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron.config.sites import Aggregation
from nemo_minitron.ops.memory import Workspace

# Elements of a site that are summed up at once. A call costs more than a cache miss, so blocks are large.
_BLOCK_ELEMENTS = 1 << 20
# Positions of a block at most: single-precision sums of more would show in the sixth digit.
_BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class SequenceMoments:
    """Sums over kept positions of a sequence. Shards of a sequence (context parallelism) add up."""

    sums: Tensor
    """`[3, B, C]` float64: of |x|, of x^2, of x."""
    count: Tensor
    """`[B]` float64: kept positions of each sample."""

    def finish(self) -> Tensor:
        """m, n and v of every sample, `[3, B, C]`; zeros for a sample without kept positions."""
        abs_sum, square_sum, total = self.sums
        share_B1 = self.count.clamp_min(1).reciprocal()[:, None]
        variance = (square_sum * share_B1).sub_((total * share_B1).square_()).clamp_min_(0)
        return torch.stack([abs_sum * share_B1, square_sum.sqrt(), variance])


class Block(NamedTuple):
    """What some consecutive positions of a site come to, for each sample and channel: `[B * C]`, float32 or float64."""

    abs_mean: Tensor
    mean: Tensor
    variance: Tensor
    rows: int
    """Positions, masked ones (which are zeros) included."""


def block_rows(positions: int, samples: int, channels: int, device: torch.device) -> int:
    """Positions of a block, for sites of up to `channels` channels; the last block may be shorter.

    A GPU sums in trees and has no cache to stay in, so it takes all at once.
    """
    if device.type == "cuda":
        return positions
    most = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, samples * channels)))
    return -(-positions // -(-positions // most))


def sequence_blocks(x_SBC: Tensor, keep_BS: Tensor | None, rows: int, workspace: Workspace) -> list[Block]:
    """Sum a site's activations over blocks of `rows` positions, with as few passes and calls as there can be.

    Mean and variance come from batch normalisation's own statistics: squared deviations from the mean, which stay exact
    where the mean is large. On a GPU they come from reductions over the complete sequence.

    Args:
        x_SBC: Activations; left unchanged. Whatever stands at masked positions, NaN included, has no effect.
        keep_BS: True where a position counts; None keeps all, which is faster.
        rows: Of `block_rows`.
        workspace: Memory to work in.
    """
    if x_SBC.is_cuda:
        return [_reduced(x_SBC if keep_BS is None else x_SBC.masked_fill(~keep_BS.t().unsqueeze(-1), 0))]
    wide = _wide(x_SBC.dtype)
    blocks = []
    for first in range(0, x_SBC.shape[0], rows):
        x_RBC = x_SBC[first : first + rows]
        buffer_RBC = workspace.take("site", x_RBC.shape, wide, x_RBC.device)
        as_it_is = x_RBC.dtype == wide and keep_BS is None and x_RBC.is_contiguous()
        x_RD = (x_RBC if as_it_is else buffer_RBC.copy_(x_RBC)).flatten(1)
        if keep_BS is not None:
            buffer_RBC.masked_fill_(~keep_BS[:, first : first + rows].t().unsqueeze(-1), 0)
        mean_D, variance_D = torch.batch_norm_update_stats(x_RD, None, None, 0.0)
        abs_mean_D = torch.abs(x_RD, out=buffer_RBC.flatten(1)).mean(0)
        blocks.append(Block(abs_mean_D, mean_D, variance_D, len(x_RBC)))
    return blocks


def _reduced(x_SBC: Tensor) -> Block:
    """A complete sequence as one block by plain reductions, as GPUs do them best.

    The variance is of deviations from the mean: a difference of squares would lose all digits where the mean is large.
    """
    x_SD = x_SBC.flatten(1).to(_wide(x_SBC.dtype))
    size = x_SD.shape[0]
    variance, mean = torch.var_mean(x_SD, 0, correction=0)
    return Block(torch.linalg.vector_norm(x_SD, 1, dim=0) / size, mean, variance, size)


def joined_moments(sites: Sequence[Sequence[Block]], count_B: Tensor) -> SequenceMoments:
    """The moments of several sites of the same samples and blocks, their channels side by side."""
    samples = count_B.shape[0]
    sums: Tensor | None = None
    for blocks in zip(*sites, strict=True):
        abs_mean, mean, variance = (
            torch.cat([block[part].view(samples, -1) for block in blocks], -1).double() for part in range(3)
        )
        mean_square = variance.addcmul_(mean, mean)
        part_3BC = torch.stack([abs_mean, mean_square, mean]).mul_(blocks[0].rows)
        sums = part_3BC if sums is None else sums.add_(part_3BC)
    if sums is None:
        raise ValueError("no blocks")
    return SequenceMoments(sums, count_B)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
