"""Divergences between two probability vectors, term by term in Python floats (natural logarithm)."""

import math
from collections.abc import Sequence


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    peak = max(logits)
    weights = [math.exp((logit - peak) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q)."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jensen_shannon(teacher: Sequence[float], student: Sequence[float], beta: float) -> float:
    middle = [beta * t + (1 - beta) * s for t, s in zip(teacher, student, strict=True)]
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)
