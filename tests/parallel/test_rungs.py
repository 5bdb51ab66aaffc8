"""A rung over two ranks that share its candidates: what is kept of one that ends the run, and what comes next."""

from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.errors import TrainingError
from nemo_minitron.json_lines import read_rows
from nemo_minitron.megatron import runtime
from nemo_minitron.search.race import Task
from nemo_minitron.stages import rungs
from nemo_minitron.stages.base import Stage, StageContext
from nemo_minitron.stages.run_folder import RunFolder
from tests.jobs import config_for
from tests.ranks import RankError, run_on_ranks

TASKS = [Task(name, 1, 0) for name in "abcd"]


class Search:
    """Of its candidates, `b` needs more memory than rank 1 has, and `c` cannot be trained."""

    problem: Any = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def prepare(self, tasks: Any) -> None:
        pass

    def measure(self, name: str, rung: int, seed: int) -> float:
        self.asked.append(name)
        if name == "b" and runtime.current().rank == 1:
            raise RuntimeError("out of memory\nby far")
        if name == "c":
            raise TrainingError("cannot be trained")
        runtime.barrier()
        return float(ord(name))


def settle(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """What is measured, and the record, on each rank."""
    config = config_for(folder, folder)
    here = runtime.start(config.parallel, seed=1)
    context = StageContext(
        config=config,
        run=RunFolder(folder),
        out=folder,
        stage=Stage(name="search", run=lambda context: {}),
        rank=here.rank,
        world_size=here.world_size,
        reporter=Reporter(silent=True),
    )
    search, record = Search(), rungs.read_record(context)
    rungs.Settling(context, search, record)(TASKS)
    runtime.stop()
    return search.asked, record.rows


def test_a_candidate_that_ends_its_ranks_is_left_out_by_the_next_attempt(tmp_path):
    with pytest.raises(RankError, match="out of memory"):
        run_on_ranks(2, settle, tmp_path, timeout=60)
    kept = [row for path in tmp_path.glob("measured*") for row in read_rows(path)]
    failed = {**TASKS[1]._asdict(), "failed": "RuntimeError: out of memory"}
    assert sorted(kept, key=str) == sorted([{**TASKS[0]._asdict(), "loss": 97.0}, failed], key=str), (
        "only rank 1's reason"
    )
    first, second = run_on_ranks(2, settle, tmp_path, timeout=60)
    assert first == second
    asked, rows = first
    assert asked == ["c", "d"]
    assert {row["candidate"]: row.get("loss", row.get("failed")) for row in rows} == {
        "a": 97.0,
        "b": "RuntimeError: out of memory",
        "c": "TrainingError: cannot be trained",
        "d": 100.0,
    }
    assert [path.name for path in tmp_path.glob("measured*")] == ["measured.jsonl"]
    assert len(read_rows(tmp_path / "measured.jsonl")) == 4
