"""Sums over tokens that are divided once, at the very end, by the global number of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSum(NamedTuple):
    """A sum over kept tokens and how many there were. Two of them add up; means of means do not."""

    total: Tensor
    """Scalar; float32, or float64 where the values were."""
    tokens: Tensor
    """Scalar, int64."""

    def plus(self, other: "TokenSum") -> "TokenSum":
        """The sum over both sets of tokens."""
        return TokenSum(self.total + other.total, self.tokens + other.tokens)

    def mean(self) -> Tensor:
        """The mean per token; 0, with a graph, when no token was kept."""
        return self.total / self.tokens.clamp_min(1)


def masked_sum(per_token: Tensor, keep: Tensor) -> TokenSum:
    """Sum `per_token` where `keep` is true; both have the same shape.

    What stands at masked places, NaN included, touches neither value nor gradient. All masked gives 0 with a graph.
    """
    keep = keep.bool()
    values = per_token if per_token.dtype == torch.float64 else per_token.float()
    return TokenSum(torch.where(keep, values, 0).sum(), keep.sum())
