"""Successive halving: many candidates measured as they are, the best trained a little, the best of those longer.

The order of a race is decided here, from losses alone; how a loss comes about is the caller's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from nemo_minitron.errors import SearchError
from nemo_minitron.json_lines import append_rows

Measurement = Callable[[str, int, int], float]
"""`measure(candidate, rung, seed)`: a loss in nats per token. Rung 0 is the candidate as pruned."""


class Task(NamedTuple):
    """One measurement to make."""

    candidate: str
    rung: int
    seed: int


Row = dict[str, Any]
"""A task's fields, and `loss`, or `failed` with the reason."""


class Record:
    """What was measured so far, one JSON line each, so that a race that was cut off goes on behind its last candidate.

    Args:
        rows: What an earlier attempt left (`rows_to_continue`); the same on every rank.
        path: Where this process adds to it; None where another one does.
    """

    def __init__(self, rows: Sequence[Row] = (), path: Path | None = None) -> None:
        self.path = path
        self._rows = {_task(row): row for row in rows}

    @property
    def rows(self) -> list[Row]:
        """All of them, in the order in which they came."""
        return list(self._rows.values())

    def is_settled(self, task: Task) -> bool:
        """Whether there is nothing to measure: it is done, or the candidate has failed in this rung."""
        return task in self._rows or any("failed" in row for row in self._of(task.candidate, task.rung))

    def take(self, rows: Sequence[Row]) -> None:
        """Keep what is not known yet, on disk too."""
        new = [row for row in rows if _task(row) not in self._rows]
        self._rows |= {_task(row): row for row in new}
        if self.path is not None and new:
            append_rows(self.path, new)

    def losses(self, candidate: str, rung: int) -> list[float] | None:
        """A candidate's losses by seed; None for one that failed."""
        rows = sorted(self._of(candidate, rung), key=_task)
        return None if not rows or any("failed" in row for row in rows) else [row["loss"] for row in rows]

    @property
    def failures(self) -> dict[str, str]:
        """Why candidates dropped out, by name."""
        return {task.candidate: row["failed"] for task, row in sorted(self._rows.items()) if "failed" in row}

    def _of(self, candidate: str, rung: int) -> list[Row]:
        return [row for task, row in self._rows.items() if task[:2] == (candidate, rung)]


def _task(row: Row) -> Task:
    return Task(row["candidate"], row["rung"], row["seed"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One round: how many candidates, and with how many seeds each."""

    candidates: int
    seeds: int = 1


@dataclass(kw_only=True)
class Standing:
    """The order of one rung: mean losses in nats per token, best first."""

    losses: dict[str, float]
    by_seed: dict[str, list[float]] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    """Baselines that had dropped out before and run along for comparison."""


@dataclass(kw_only=True)
class RaceResult:
    """The standings of all rungs."""

    standings: list[Standing]

    @property
    def winner(self) -> str:
        """The best of the last rung."""
        return next(iter(self.standings[-1].losses))

    @property
    def correlations(self) -> list[float | None]:
        """Spearman's rank correlation of each rung with the next one, over candidates that are in both."""
        pairs = zip(self.standings, self.standings[1:], strict=False)
        return [rank_correlation(before.losses, after.losses) for before, after in pairs]


def run_race(
    candidates: Sequence[str],
    rungs: Sequence[Rung],
    complete: Callable[[Sequence[Task]], None],
    *,
    record: Record,
    comparing: Callable[[Standing], Sequence[str]] = lambda first: (),
) -> RaceResult:
    """Measure all candidates, then the best of each rung in the next one.

    Args:
        candidates: Names.
        rungs: What comes after the first measurement.
        complete: Settles a rung's tasks in the record, as `measure_in_turn` does.
        record: Grows with every measurement.
        comparing: From the standing of the first trained rung (of the untrained one, if there is none) to candidates
            that run in the last rung in any case.

    Raises:
        SearchError: No candidate is left; lists why.
    """
    all_rungs = [Rung(candidates=len(candidates)), *rungs]
    standings: list[Standing] = []
    entering: Sequence[str] = candidates
    for number, rung in enumerate(all_rungs):
        chosen = list(entering[: rung.candidates])
        extra: tuple[str, ...] = ()
        if number == len(all_rungs) - 1 and number > 0:
            extra = tuple(name for name in comparing(standings[min(1, number - 1)]) if name not in chosen)
        names = [*chosen, *extra]
        complete([Task(name, number, seed) for name in names for seed in range(rung.seeds)])
        found = {name: record.losses(name, number) for name in names}
        by_seed = {name: losses for name, losses in found.items() if losses is not None}
        if not by_seed:
            reasons = "\n".join(f"  - {name}: {why}" for name, why in record.failures.items())
            raise SearchError(f"no candidate is left in rung {number}\n{reasons}", rule="at least one can be measured")
        losses = dict(sorted(((name, fmean(own)) for name, own in by_seed.items()), key=lambda pair: pair[1]))
        standings.append(Standing(losses=losses, by_seed=by_seed, compared=extra))
        entering = list(losses)
    return RaceResult(standings=standings)


def measure_in_turn(
    tasks: Iterable[Task],
    measure: Measurement,
    *,
    record: Record,
    failures: tuple[type[BaseException], ...],
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Measure what the record does not hold, one after the other; a candidate that fails is measured no further.

    Args:
        tasks: Of one rung.
        measure: See `Measurement`.
        record: Grows with every measurement.
        failures: Exceptions that cost a candidate its place, and not the race its end.
        notes: What else each row says.
    """
    for task in tasks:
        if record.is_settled(task):
            continue
        try:
            loss = measure(*task)
        except failures as error:
            record.take([{**failed_row(task, error), **notes}])
            continue
        found = {"loss": loss} if np.isfinite(loss) else {"failed": f"loss {loss}"}
        record.take([{**task._asdict(), **found, **notes}])


def failed_row(task: Task, error: BaseException) -> Row:
    """What the record says of a candidate that failed."""
    return {**task._asdict(), "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def group_sizes(ranks: int, unit: int, least: int) -> list[int]:
    """Sizes of equal groups of ranks, smallest first: multiples of `unit` from `least` on that divide the ranks.

    Args:
        ranks: All there are, a multiple of `unit`.
        unit: Ranks that hold one copy of a model.
        least: Ranks that a group has at least; all of them together are one group in any case.
    """
    return [size for size in range(unit, ranks + 1, unit) if ranks % size == 0 and size >= min(least, ranks)]


def group_count(tasks: int, ranks: int, sizes: Sequence[int]) -> int:
    """How many groups measure so many tasks: as few as give each task one, or else as many as there can be.

    Args:
        tasks: To be measured.
        ranks: All there are.
        sizes: That a group may have; not empty.
    """
    counts = sorted(ranks // size for size in sizes)
    return next((count for count in counts if count >= tasks), counts[-1])


def rank_correlation(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Spearman's rank correlation over the names in both; None for fewer than three, or where all are equal."""
    names = [name for name in after if name in before]
    if len(names) < 3:
        return None
    first, second = ([losses[name] for name in names] for losses in (before, after))
    if min(first) == max(first) or min(second) == max(second):
        return None
    from scipy.stats import spearmanr  # slow to import

    return float(spearmanr(first, second).statistic)
