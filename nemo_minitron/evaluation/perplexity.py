"""Perplexity and bits per byte, and how far chance in the choice of texts may have moved them.

Perplexity is `exp(nats / tokens)`, bits per byte `nats / bytes / ln 2`, where `nats` is the summed negative
log-likelihood of the predicted tokens and `bytes` what they are in UTF-8: the second does not depend on the tokenizer.
Tokens of one text are not independent, so the unit of chance is a stretch of text (a batch of windows, a document):
with sums `n_i` and counts `t_i` the mean is the ratio `r = sum n_i / sum t_i`, and its standard error is that of a
ratio of means, linearised (Cochran, Sampling Techniques, chapter 6):
`sqrt(k / (k - 1) * sum (n_i - r t_i)^2) / sum t_i`.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsPerByte:
    """A measured compression rate: bits that the model needs for a byte of text."""

    value: float
    standard_error: float | None
    """Of `value`; None with fewer than two units."""
    bytes: int


def perplexity(nats: Sequence[float], tokens: Sequence[float]) -> Perplexity:
    """Perplexity from each unit's summed nats and number of tokens; units without tokens do not count.

    Without any token it is not a number.
    """
    mean, error, total, units = _ratio(nats, tokens)
    value = _exp(mean)
    return Perplexity(
        value=value,
        standard_error=None if error is None else value * error,
        nats_per_token=mean,
        tokens=int(total),
        units=units,
    )


def bits_per_byte(nats: Sequence[float], sizes: Sequence[float]) -> BitsPerByte:
    """Bits per byte from each unit's summed nats and number of bytes; units without bytes do not count.

    Without any byte it is not a number.
    """
    mean, error, total, _ = _ratio(nats, sizes)
    return BitsPerByte(
        value=mean / math.log(2), standard_error=None if error is None else error / math.log(2), bytes=int(total)
    )


def _ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None, float, int]:
    """`sum sums / sum counts`, its standard error (None with fewer than two units), all counts, number of units."""
    pairs = [(float(n), float(t)) for n, t in zip(sums, counts, strict=True) if t > 0]
    total = sum(t for _, t in pairs)
    mean = math.fsum(n for n, _ in pairs) / total if total else math.nan
    if len(pairs) < 2:
        return mean, None, total, len(pairs)
    squares = math.fsum((n - mean * t) ** 2 for n, t in pairs)
    return mean, math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / total, total, len(pairs)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
