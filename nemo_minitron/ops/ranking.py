"""Which units stay. Deterministic: every machine and every rank picks the same ones."""

import torch
from torch import Tensor

from nemo_minitron.errors import ScoresError

TIE = 1e-6
"""Neighbours in the ranking whose scores differ by no more than this, relative to the larger, are tied. Tensor
parallelism adds up in another order, which moves scores of fp32 activations by 1e-7; that must not tell copies of one
unit apart."""


def top_indices(score: Tensor, *, keep: int) -> Tensor:
    """The `keep` best of a vector of scores, int64, in ascending order; ties go to the lower index.

    Raises:
        ScoresError: `score` is not a vector, holds NaN or infinity, or has fewer than `keep` entries.
    """
    if score.dim() != 1 or not 0 <= keep <= score.numel():
        raise ScoresError(f"cannot keep {keep} of scores shaped {tuple(score.shape)}", rule="0 <= keep <= units")
    return ranked(score)[:keep].sort().values


def ranked(score: Tensor) -> Tensor:
    """Indices of a vector of scores, int64, best first; ties (see `TIE`) go to the lower index.

    Raises:
        ScoresError: `score` is not a vector, or holds NaN or infinity.
    """
    if score.dim() != 1:
        raise ScoresError(f"scores shaped {tuple(score.shape)} cannot be ranked", rule="one score a unit")
    if not bool(torch.isfinite(score).all()):
        raise ScoresError(
            "the scores hold NaN or infinity",
            rule="every score is a finite number",
            remedy="score again; look for overflow in the model's activations",
        )
    values, order = score.sort(descending=True, stable=True)
    apart = values[:-1] - values[1:] > TIE * torch.maximum(values[:-1].abs(), values[1:].abs())
    ties = torch.zeros_like(order)
    ties[1:] = apart.cumsum(0)
    return order[(ties * score.numel() + order).argsort()]


def top_heads(score_H: Tensor, *, groups: Tensor, num_groups: int, heads_per_group: int) -> Tensor:
    """The best query heads of each kept KV group, as global head indices in ascending order.

    Heads of one group share their key and value, so every kept group must keep equally many.

    Args:
        score_H: One score a query head; group `g` owns heads `g * H / num_groups` and following.
        groups: Kept groups, ascending.
        num_groups: Groups before pruning.
        heads_per_group: How many heads each kept group keeps.

    Raises:
        ScoresError: Sizes do not fit, or a score is not finite.
    """
    if score_H.dim() != 1 or score_H.numel() % num_groups:
        raise ScoresError(
            f"{score_H.numel()} head scores and {num_groups} KV groups",
            rule="the number of heads is a multiple of the number of groups",
        )
    score_GR = score_H.reshape(num_groups, -1)
    size = score_GR.shape[1]
    kept = [top_indices(score_GR[group], keep=heads_per_group) + group * size for group in groups.tolist()]
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64)
