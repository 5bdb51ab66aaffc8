"""Perplexity, and how far chance in the choice of texts may have moved it.

Perplexity is `exp(nats / tokens)`, where `nats` is the summed negative log-likelihood of the predicted tokens. Tokens
of one text are not independent, so the unit of chance is a stretch of text (a batch of windows, a document): with sums
`n_i` and counts `t_i` the mean is the ratio `r = sum n_i / sum t_i`, and its standard error is that of a ratio of
means, linearised (Cochran, Sampling Techniques, chapter 6): `sqrt(k / (k - 1) * sum (n_i - r t_i)^2) / sum t_i`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """A measured perplexity; `inf` where it is beyond what a float holds."""

    value: float
    """`exp(nats_per_token)`."""
    standard_error: float | None
    """Of `value`; None with fewer than two units."""
    nats_per_token: float
    tokens: int
    units: int


def perplexity(nats: Sequence[float], tokens: Sequence[float]) -> Perplexity:
    """Perplexity from each unit's summed nats and number of tokens; units without tokens do not count.

    Without any token it is not a number.
    """
    pairs = [(float(n), float(t)) for n, t in zip(nats, tokens, strict=True) if t > 0]
    total = sum(t for _, t in pairs)
    mean = math.fsum(n for n, _ in pairs) / total if total else math.nan
    value = _exp(mean)
    error = None
    if len(pairs) > 1:
        squares = math.fsum((n - mean * t) ** 2 for n, t in pairs)
        error = value * math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / total
    return Perplexity(value=value, standard_error=error, nats_per_token=mean, tokens=int(total), units=len(pairs))


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
