"""Value and derivative of each divergence on a block of tokens, in four buffers that are overwritten.

For the divergences of `nemo_minitron.ops.divergence`, whose formulas these are; the derivatives are taken by hand, so
that no further `[rows, columns]` tensor is needed. Shapes: rows of tokens, columns of this rank's vocabulary shard.
"""

import torch
from torch import Tensor

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import Divergence

_LEAST = {torch.float32: 1.2e-38, torch.float64: 1e-300}
"""Below it a mixture counts as this much. Its logarithm stays finite, and what it multiplies is 0. A normal number: of
smaller ones a processor that flushes them (`megatron.runtime`) makes zeros."""


def divergence_terms(log_q: Tensor, log_p: Tensor, p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    """D(p, q) of this shard's columns, `[rows]`, without the temperature's square.

    Args:
        log_q: The student's log-probabilities over the complete vocabulary, `[rows, columns]`. On return: dD / dlog q
            of every column up to a multiple of q, which does not change `a - q sum(a)`.
        log_p: The teacher's. Arbitrary on return, as is p.
        p: exp(log_p).
        q: exp(log_q). Unchanged.
        divergence: Which one; the forward KL has a shorter way of its own.
    """
    match divergence.kind:
        case DivergenceKind.REVERSE_KL:
            return log_q.sub_(log_p).mul_(q).sum(-1)
        case DivergenceKind.TOTAL_VARIATION:
            gap = torch.sub(q, p, out=log_q)
            value = torch.abs(gap, out=log_p).sum(-1) / 2
            gap.sign_().mul_(q).mul_(0.5)
            return value
        case DivergenceKind.JENSEN_SHANNON:
            return _jensen_shannon(log_q, log_p, p, q, divergence.beta)
        case DivergenceKind.SKEWED_KL:
            return _skewed_kl(log_q, log_p, p, q, divergence.skew)
        case DivergenceKind.SKEWED_REVERSE_KL:
            return _skewed_reverse_kl(log_q, log_p, p, q, divergence.skew)
        case DivergenceKind.FORWARD_KL:
            raise ValueError("the forward KL is computed without its log-probabilities")


def _log_mixture(p: Tensor, q: Tensor, p_weight: float, out: Tensor) -> Tensor:
    """log(w p + (1 - w) q) in `out`, which may be p."""
    return torch.mul(p, p_weight, out=out).add_(q, alpha=1 - p_weight).clamp_min_(_LEAST[out.dtype]).log_()


def _jensen_shannon(log_q: Tensor, log_p: Tensor, p: Tensor, q: Tensor, beta: float) -> Tensor:
    # dD/dq = (1 - beta) log(q / m): the parts from m add up to a constant.
    log_m = _log_mixture(p, q, beta, out=p)
    log_q.sub_(log_m).mul_(q)
    ratio = torch.sub(log_p, log_m, out=log_m)
    teacher = log_p.exp_().mul_(ratio).sum(-1)
    student = log_q.mul_(1 - beta).sum(-1)
    return beta * teacher + student


def _skewed_kl(log_q: Tensor, log_p: Tensor, p: Tensor, q: Tensor, skew: float) -> Tensor:
    # dD/dq = -(1 - skew) p / m
    ratio = log_p.sub_(_log_mixture(p, q, skew, out=log_q))
    value = torch.mul(ratio, p, out=log_q).sum(-1)
    torch.exp(ratio, out=log_q).mul_(q).mul_(skew - 1)
    return value


def _skewed_reverse_kl(log_q: Tensor, log_p: Tensor, p: Tensor, q: Tensor, skew: float) -> Tensor:
    # dD/dq = log(q / m) + 1 - skew q / m
    ratio = log_q.sub_(_log_mixture(p, q, 1 - skew, out=log_p))
    value = torch.mul(ratio, q, out=log_p).sum(-1)
    ratio.sub_(torch.exp(ratio, out=p), alpha=skew).mul_(q)
    return value
