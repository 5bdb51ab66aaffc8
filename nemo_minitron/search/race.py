"""Successive halving: many candidates measured as they are, the best trained a little, the best of those longer.

The order of a race is decided here, from losses alone; how a loss comes about is the caller's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from nemo_minitron.errors import SearchError
from nemo_minitron.json_lines import append_rows

Measurement = Callable[[str, int, int], float]
"""`measure(candidate, rung, seed)`: a loss in nats per token. Rung 0 is the candidate as pruned."""


class Record:
    """What was measured so far, one JSON line each, so that a race that was cut off goes on behind its last candidate.

    Args:
        rows: What an earlier attempt left (`rows_to_continue`); the same on every rank.
        path: Where this process adds to it; None where another one does.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] = (), path: Path | None = None) -> None:
        self._path = path
        self._rows = {(row["candidate"], row["rung"], row["seed"]): row for row in rows}

    def find(self, candidate: str, rung: int, seed: int) -> dict[str, Any] | None:
        """A measurement: with `loss`, or with `failed` and the reason."""
        return self._rows.get((candidate, rung, seed))

    def add(self, candidate: str, rung: int, seed: int, **values: Any) -> None:
        """Keep a measurement, on disk too."""
        row = {"candidate": candidate, "rung": rung, "seed": seed, **values}
        self._rows[candidate, rung, seed] = row
        if self._path is not None:
            append_rows(self._path, [row])

    @property
    def failures(self) -> dict[str, str]:
        """Why candidates dropped out, by name."""
        return {name: row["failed"] for (name, _, _), row in self._rows.items() if "failed" in row}


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
    measure: Measurement,
    *,
    record: Record,
    failures: tuple[type[BaseException], ...],
    comparing: Callable[[Standing], Sequence[str]] = lambda first: (),
) -> RaceResult:
    """Measure all candidates, then the best of each rung in the next one.

    Args:
        candidates: Names.
        rungs: What comes after the first measurement.
        measure: See `Measurement`. What `record` holds is not measured again.
        record: Grows with every measurement.
        failures: Exceptions that cost a candidate its place, and not the race its end.
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
        found = {
            name: _measured(name, number, rung.seeds, measure, record=record, failures=failures)
            for name in [*chosen, *extra]
        }
        by_seed = {name: losses for name, losses in found.items() if losses is not None}
        if not by_seed:
            reasons = "\n".join(f"  - {name}: {why}" for name, why in record.failures.items())
            raise SearchError(f"no candidate is left in rung {number}\n{reasons}", rule="at least one can be measured")
        losses = dict(sorted(((name, fmean(own)) for name, own in by_seed.items()), key=lambda pair: pair[1]))
        standings.append(Standing(losses=losses, by_seed=by_seed, compared=extra))
        entering = list(losses)
    return RaceResult(standings=standings)


def _measured(
    name: str,
    rung: int,
    seeds: int,
    measure: Measurement,
    *,
    record: Record,
    failures: tuple[type[BaseException], ...],
) -> list[float] | None:
    """Losses with every seed; None for a candidate that failed."""
    losses: list[float] = []
    for seed in range(seeds):
        if (row := record.find(name, rung, seed)) is None:
            try:
                loss = measure(name, rung, seed)
            except failures as error:
                record.add(name, rung, seed, failed=f"{type(error).__name__}: {str(error).splitlines()[0]}")
                return None
            if not np.isfinite(loss):
                record.add(name, rung, seed, failed=f"loss {loss}")
                return None
            record.add(name, rung, seed, loss=loss)
            row = {"loss": loss}
        if "failed" in row:
            return None
        losses.append(row["loss"])
    return losses


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
