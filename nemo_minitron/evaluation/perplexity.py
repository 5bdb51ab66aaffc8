"""Perplexity, and how far chance in the choice of texts may have moved it.

Perplexity is `exp(nats / tokens)`, where `nats` is the summed negative log-likelihood of the predicted tokens. Tokens
of one text are not independent, so the unit of chance is a sample (a window, a document): with sums `n_i` and counts
`t_i` the mean is the ratio `r = sum n_i / sum t_i`, and its standard error is that of a ratio of means, linearised
(Cochran, Sampling Techniques, chapter 6): `sqrt(k / (k - 1) * sum (n_i - r t_i)^2) / sum t_i`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SUMS = ("samples", "tokens", "nats", "tokens_squared", "nats_squared", "nats_tokens")
"""Names of the sums that `perplexity` needs; they add up over micro-batches, ranks and runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """A measured perplexity; `inf` where it is beyond what a float holds."""

    value: float
    """`exp(nats_per_token)`."""
    standard_error: float | None
    """Of `value`; None with fewer than two samples."""
    nats_per_token: float
    tokens: int
    samples: int


def sample_sums(nats_BS: Tensor, keep_BS: Tensor) -> dict[str, Tensor]:
    """Sums over a batch, as float64 scalars; samples without a kept token do not count.

    Args:
        nats_BS: Negative log-likelihood of each token, `[b, s]`; what stands at masked positions, NaN too, is left out.
        keep_BS: Boolean, `[b, s]`.
    """
    nats = torch.where(keep_BS, nats_BS.double(), 0.0).sum(1)
    tokens = keep_BS.sum(1).double()
    return {
        "samples": (tokens > 0).double().sum(),
        "tokens": tokens.sum(),
        "nats": nats.sum(),
        "tokens_squared": (tokens * tokens).sum(),
        "nats_squared": (nats * nats).sum(),
        "nats_tokens": (nats * tokens).sum(),
    }


def perplexity(sums: Mapping[str, float | Tensor]) -> Perplexity:
    """Perplexity from the sums of all samples (`SUMS`); with `nats` and `tokens` alone, without a standard error.

    Without any token it is not a number.
    """
    total = {name: float(sums[name]) for name in SUMS if name in sums}
    tokens, samples = total["tokens"], int(total.get("samples", 0))
    mean = total["nats"] / tokens if tokens else math.nan
    value = _exp(mean)
    error = None
    if samples > 1 and tokens and all(name in total for name in SUMS):
        squares = total["nats_squared"] - 2 * mean * total["nats_tokens"] + mean**2 * total["tokens_squared"]
        error = value * math.sqrt(max(squares, 0.0) * samples / (samples - 1)) / tokens
    return Perplexity(value=value, standard_error=error, nats_per_token=mean, tokens=int(tokens), samples=samples)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
