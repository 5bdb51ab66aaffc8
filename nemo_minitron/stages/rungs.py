"""The measurements of one rung, shared out over groups of ranks: each of them prunes and trains its own candidate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nemo_minitron.errors import MinitronError
from nemo_minitron.json_lines import append_rows, read_rows, rows_to_continue
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.groups import RankGroup, in_groups, most_groups
from nemo_minitron.search.problem import SearchProblem
from nemo_minitron.search.race import Record, Row, Task, failed_row, measure_in_turn
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.processes import peer_error, release_memory

MEASURED = "measured.jsonl"
_PARTS = "measured.rank*.jsonl"


class Measuring(Protocol):
    """What measures candidates."""

    problem: SearchProblem

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Make what they share. Collective over all ranks."""

    def measure(self, name: str, rung: int, seed: int) -> float:
        """See `search.race.Measurement`. Collective over the ranks of a group."""


class Settling:
    """Settles the tasks of a rung: what `search.race.run_race` calls.

    Args:
        context: Of the stage.
        search: Measures one candidate.
        record: The same on every rank; it is again when a rung is settled.
    """

    def __init__(self, context: StageContext, search: Measuring, record: Record) -> None:
        self._context, self._search, self._record = context, search, record

    def __call__(self, tasks: Sequence[Task]) -> None:
        """Collective."""
        missing = [task for task in tasks if not self._record.is_settled(task)]
        if not missing:
            return
        self._search.prepare(missing)
        release_memory()
        ranks = self._context.world_size
        count = self.groups(tasks)
        if count > 1:
            self._context.reporter.line(
                f"          {len(missing)} measurements by {count} groups of {ranks // count} rank(s)"
            )
        found = in_groups(count, lambda group: self._measured(group, missing))
        self._record.path = self._context.out / MEASURED if self._context.rank == 0 else None
        for rows in found:
            self._record.take(rows)
        for rows in found[1:]:
            for row in rows:
                self._tell(row)

    def groups(self, tasks: Sequence[Task]) -> int:
        """How many groups share a rung; the number of its tasks decides, measured already or not."""
        return self._search.problem.groups(len(tasks), self._context.world_size) if most_groups() > 1 else 1

    def _measured(self, group: RankGroup, tasks: Sequence[Task]) -> list[Row]:
        """What this group has measured."""
        record, context = self._record, self._context
        before, size = len(record.rows), runtime.current().world_size
        first = group.number * size
        if context.rank == 0:
            record.path = context.out / MEASURED
        else:
            record.path = _part(context, first) if context.rank == first else None
        measure_in_turn(
            (tasks[number] for number in group.tickets(len(tasks))),
            self._measure,
            record=record,
            failures=failures(size),
            notes={"rank": first} if group.count > 1 else {},
        )
        release_memory()
        return record.rows[before:]

    def _measure(self, name: str, rung: int, seed: int) -> float:
        task = Task(name, rung, seed)
        try:
            loss = self._search.measure(*task)
        except (MinitronError, RuntimeError, ValueError) as error:
            row = failed_row(task, error)
            if isinstance(error, failures(runtime.current().world_size)):
                self._tell(row)
            elif not peer_error(error):
                # Ranks that share a candidate may have met it at different places, or one of them alone: they cannot go
                # on together. The same command does, without this candidate.
                append_rows(_part(self._context, self._context.rank), [row])
            raise
        self._tell({**task._asdict(), "loss": loss})
        return loss

    def _tell(self, row: Row) -> None:
        rung, seed = row["rung"], row["seed"]
        where = "as pruned" if rung == 0 else f"rung {rung}" + (f", seed {seed}" if seed else "")
        what = f"{row['loss']:.4f} nats per token" if "loss" in row else row["failed"]
        self._context.reporter.line(f"          {row['candidate']:<28} {where:<16} {what}")


def read_record(context: StageContext) -> Record:
    """What an earlier attempt measured, in all of its groups; the same on every rank, and rank 0 adds to it."""
    path = context.out / MEASURED

    def read() -> list[Row]:
        record = Record(rows_to_continue(path), path)
        for part in sorted(context.out.glob(_PARTS)):
            record.take(read_rows(part))
        clear(context)
        return record.rows

    rows = runtime.on_rank_zero(read, doing="reads what was measured before")
    return Record(rows, path if context.rank == 0 else None)


def clear(context: StageContext) -> None:
    """Delete what single groups have written, which is in the common file too."""
    for part in context.out.glob(_PARTS):
        part.unlink()


def failures(ranks: int) -> tuple[type[Exception], ...]:
    """What costs a candidate its place: errors that all ranks of a group meet alike; alone, also those of libraries."""
    return (MinitronError,) if ranks > 1 else (MinitronError, RuntimeError, ValueError)


def _part(context: StageContext, rank: int) -> Path:
    return context.out / f"measured.rank{rank}.jsonl"
