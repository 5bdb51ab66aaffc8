"""Divergences between two probability vectors: term by term in Python floats, and in float64 tensors of probabilities.

Natural logarithm. Neither form works on log-probabilities, as the code under test does.
"""

import math
from collections.abc import Sequence

import torch


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    peak = max(logits)
    weights = [math.exp((logit - peak) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q)."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mix(p: Sequence[float], q: Sequence[float], weight: float) -> list[float]:
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def jensen_shannon(teacher: Sequence[float], student: Sequence[float], beta: float) -> float:
    middle = mix(teacher, student, beta)
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def divergence(kind: str, p: Sequence[float], q: Sequence[float], *, beta: float = 0.5, skew: float = 0.1) -> float:
    """Of the teacher's p and the student's q."""
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: jensen_shannon(p, q, beta),
        "skewed_kl": lambda: kl(p, mix(p, q, skew)),
        "skewed_reverse_kl": lambda: kl(q, mix(q, p, skew)),
        "total_variation": lambda: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    }[kind]()


def tensor_divergence(kind: str, p: torch.Tensor, q: torch.Tensor, *, beta: float, skew: float) -> torch.Tensor:
    """The same of every row, differentiable in q where both are positive."""

    def pair(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(a > 0, a * torch.log(torch.where(a > 0, a, 1) / torch.where(a > 0, b, 1)), 0).sum(-1)

    middle = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: pair(p, q),
        "reverse_kl": lambda: pair(q, p),
        "jensen_shannon": lambda: beta * pair(p, middle) + (1 - beta) * pair(q, middle),
        "skewed_kl": lambda: pair(p, skew * p + (1 - skew) * q),
        "skewed_reverse_kl": lambda: pair(q, skew * q + (1 - skew) * p),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()
