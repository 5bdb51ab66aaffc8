"""Targets that hold a few tokens of the teacher's distribution, and the random numbers to draw them with.

Sampled targets: draw token ids with replacement from the teacher's distribution p; the target of an id is its share of
the draws. Its expectation is p, and the gradient of the forward KL is linear in the target, so the gradient is that of
the full distribution on average. Source: Anshumann et al., arXiv:2503.16870. Top-k targets: the k likeliest ids with
their log-probabilities, and one bucket with the probability of all others.

Shapes: N tokens, K entries per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """A few entries of the teacher's distribution for every token; the same on all tensor-parallel ranks.

    Attributes:
        ids: `[N, K]` int32 or int64, each at most once per token; -1 in places that are not used.
        log_probs: `[N, K]` float: log-probabilities (top-k) or logarithms of the shares of draws (sampled); -inf where
            `ids` is -1.
        tail: `[N]` probability of all other ids together, for top-k targets. None for sampled targets, whose entries
            sum to 1.
        temperature: At which the distribution was taken; the student's is taken at the same.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor | None = None
    temperature: float = 1.0

    @classmethod
    def from_counts(cls, ids: Tensor, counts: Tensor, *, temperature: float = 1.0) -> "SparseTargets":
        """Sampled targets from how often each id was drawn, `[N, K]`; 0 where `ids` is -1."""
        wide = torch.where(ids < 0, 0, counts).double()
        shares = wide / wide.sum(-1, keepdim=True).clamp_min(1)
        return cls(ids=ids, log_probs=shares.log().float(), temperature=temperature)

    @property
    def sampled(self) -> bool:
        """Whether the entries are random draws."""
        return self.tail is None

    def select(self, index: Tensor | slice) -> "SparseTargets":
        """Some of the tokens."""
        tail = None if self.tail is None else self.tail[index]
        return SparseTargets(
            ids=self.ids[index], log_probs=self.log_probs[index], tail=tail, temperature=self.temperature
        )

    def bucket_logp(self, dtype: torch.dtype) -> Tensor:
        """`[N, K + 1]` log-probabilities of the entries and of the tail; -inf for what is empty."""
        tail = torch.zeros_like(self.log_probs[:, 0]) if self.tail is None else self.tail
        return torch.cat([self.log_probs.to(dtype), tail.to(dtype).log().unsqueeze(1)], 1)


def uniforms(seed: int, counters: Tensor, draws: int) -> Tensor:
    """`[N, draws]` float64 in [0, 1) that depend on nothing but the seed, a token's counter, and the draw's number.

    So whoever holds the token makes the same numbers. SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", 2014): a stream for every token, started at the mixed seed and counter.

    Args:
        seed: Any integer.
        counters: `[N]` int64, each token's own number, for example its place in the data.
        draws: How many numbers per token.
    """
    start = _mixed(_mixed(counters.long() + _signed(seed * _GOLDEN)) + _signed((seed >> 64) * _GOLDEN))
    steps = torch.arange(1, draws + 1, device=counters.device) * _signed(_GOLDEN)
    bits = _mixed(start.unsqueeze(1) + steps)
    return _shift(bits, 11).double() * 2.0**-53


def count_draws(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids of every row of `[N, draws]` int64 in ascending order, and how often each occurs.

    Returns:
        `[N, K]` ids, -1 where a row has fewer than the most, and `[N, K]` counts, 0 there.
    """
    ordered = ids.sort(1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = first.cumsum(1) - 1
    counts = torch.zeros_like(ordered).scatter_add_(1, place, torch.ones_like(ordered))
    distinct = torch.full_like(ordered, -1).scatter_(1, place, ordered)
    most = int(first.sum(1).max()) if ids.numel() else 0
    return distinct[:, :most], counts[:, :most]


def _signed(value: int) -> int:
    """The low 64 bits as a signed integer; int64 arithmetic wraps around as SplitMix64's does."""
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, by: int) -> Tensor:
    """Right shift that fills with zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shift(x, 27)) * _signed(_MIX[1])
    return x ^ _shift(x, 31)
