"""The results file: a line for each trial of each seed. Means over seeds, and differences of two trials."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from benchmarks.claims.students import Trial
from benchmarks.claims.table import Measure
from nemo_minitron.json_lines import read_rows


class Key(NamedTuple):
    """What a line is about."""

    student: str
    lesson: str
    seed: int


def key_of(row: dict[str, Any]) -> Key:
    """A line's."""
    return Key(row["student"], row["lesson"], row["seed"])


@dataclass(frozen=True)
class Difference:
    """How much more of a measure one trial has than another, over the windows of all seeds that have both.

    Attributes:
        mean: Nats per token.
        error: Standard error over windows.
        seeds: That have both.
    """

    mean: float
    error: float
    seeds: tuple[int, ...]


class Results:
    """What was measured."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = {key_of(row): row for row in rows}

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a results file."""
        return cls(read_rows(path))

    def of(self, trial: Trial) -> dict[int, dict[str, Any]]:
        """The lines of a trial, by seed."""
        return {key.seed: row for key, row in self._rows.items() if (key.student, key.lesson) == trial.key}

    def every(self) -> list[dict[str, Any]]:
        """All lines that are trials."""
        return [row for row in self._rows.values() if "nats" in row]

    def seconds(self, trials: Sequence[Trial], clock: str) -> float:
        """What some trials took in all, by `seconds` or `cpu_seconds`."""
        return sum(float(row[clock]) for trial in trials for row in self.of(trial).values())

    def mean(self, trial: Trial, name: str) -> float | None:
        """Nats per token over all windows of all seeds; None where there are none."""
        found = [value for row in self.of(trial).values() for value in row[name]]
        return fmean(found) if found else None

    def difference(self, more: Trial, less: Trial, measure: Measure) -> Difference | None:
        """Window by window; None where no seed has both."""
        first, second = self.of(more), self.of(less)
        seeds = tuple(seed for seed in first if seed in second)
        gaps = [
            one - other
            for seed in seeds
            for one, other in zip(first[seed][measure.value], second[seed][measure.value], strict=True)
        ]
        if not gaps:
            return None
        error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
        return Difference(fmean(gaps), error, seeds)
