"""Importance of units by the letter of arXiv:2407.14679, sec. 2.2, and arXiv:2403.03853, eq. (1)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

Numbers = Sequence[float]


def mean(values: Numbers) -> float:
    return sum(abs(value) for value in values) / len(values)


def l2(values: Numbers) -> float:
    return math.sqrt(sum(value * value for value in values))


def var(values: Numbers) -> float:
    centre = sum(values) / len(values)
    return sum((value - centre) ** 2 for value in values) / len(values)


AGGREGATIONS = {"mean": mean, "l2": l2, "var": var}


def importance(samples: Sequence[Sequence[Numbers]], *, batch: str, sequence: str) -> list[float]:
    """`samples[sample][position][channel]`, kept positions only; sequence first, then batch."""
    channels = len(samples[0][0])
    return [
        AGGREGATIONS[batch]([AGGREGATIONS[sequence]([row[channel] for row in sample]) for sample in samples])
        for channel in range(channels)
    ]


def block_influence(inputs: Sequence[Numbers], outputs: Sequence[Numbers]) -> float:
    """1 - mean cosine between what enters a layer and what leaves it, over tokens."""
    cosines = [
        sum(a * b for a, b in zip(x, y, strict=True)) / (l2(x) * l2(y)) for x, y in zip(inputs, outputs, strict=True)
    ]
    return 1 - sum(cosines) / len(cosines)


def sample_statistics(tokens: Iterable[Any]) -> dict[str, Any]:
    """mean, l2 and var over the tokens of one sample; a token is a vector of channels.

    Token by token, with a second walk for the deviations from the mean.
    """
    rows = list(tokens)
    size, total, absolute, squares = len(rows), 0.0, 0.0, 0.0
    for row in rows:
        total = total + row
        absolute = absolute + abs(row)
        squares = squares + row * row
    deviations = 0.0
    for row in rows:
        deviations = deviations + (row - total / size) ** 2
    return {"mean": absolute / size, "l2": squares**0.5, "var": deviations / size}


def over_samples(values: Sequence[Any], batch: str) -> Any:
    """One number per channel from the statistic of each sample."""
    count, total = len(values), 0.0
    for value in values:
        total = total + (value * value if batch == "l2" else abs(value))
    if batch == "l2":
        return total**0.5
    mean_value = total / count
    if batch == "mean":
        return mean_value
    spread = 0.0
    for value in values:
        spread = spread + (value - mean_value) ** 2
    return spread / count
