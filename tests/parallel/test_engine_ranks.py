"""The engine over two ranks: rank 0 decides and works, the others follow, and errors of rank 0 are everybody's."""

import io
import sys
import time
from pathlib import Path

from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.errors import DataError
from nemo_minitron.megatron import waiting
from nemo_minitron.stages.base import Stage, StageContext
from nemo_minitron.stages.engine import Request, run_chain
from nemo_minitron.stages.processes import DistributedProcesses, is_reported
from nemo_minitron.stages.run_folder import RunFolder
from tests.jobs import config_for
from tests.ranks import run_on_ranks


def go(folder: Path, chain: tuple[Stage, ...]) -> DistributedProcesses:
    config = config_for(folder, folder)
    processes = DistributedProcesses(config.parallel, config.seed)
    run_chain(
        chain,
        Request(config=config, run=RunFolder(folder / "run")),
        processes=processes,
        reporter=Reporter(silent=True),
    )
    return processes


def note(context: StageContext) -> dict:
    (context.out / f"rank{context.rank}").touch()
    return {"sum": context.rank}


def two_stages(folder: Path) -> tuple[int, dict, dict]:
    processes = go(
        folder, (Stage(name="import", run=note), Stage(name="score", run=note, collective=True, needs=("import",)))
    )
    run = RunFolder(folder / "run")
    files = {name: sorted(path.name for path in run.stage(name).glob("rank*")) for name in ("import", "score")}
    return processes.rank, files, run.result("score")


def test_only_collective_stages_run_everywhere_and_all_see_what_is_whole(tmp_path):
    results = run_on_ranks(2, two_stages, tmp_path)
    assert [rank for rank, _, _ in results] == [0, 1]
    for _, files, result in results:
        assert files == {"import": ["rank0"], "score": ["rank0", "rank1"]}
        assert result["sum"] == 0  # rank 0's


def refuse(context: StageContext) -> dict:
    raise DataError("texts.txt: is empty", rule="some text", remedy="name another file")


def failing_stage(folder: Path) -> tuple[str, bool]:
    try:
        go(folder, (Stage(name="import", run=refuse),))
    except DataError as error:
        return str(error), is_reported(error)
    return "", False


def test_an_error_of_rank_zero_ends_all_and_only_rank_zero_shows_it(tmp_path):
    (first, first_echo), (second, second_echo) = run_on_ranks(2, failing_stage, tmp_path)
    assert first == second == "texts.txt: is empty\n  rule: some text\n  remedy: name another file"
    assert (first_echo, second_echo) == (False, True)


def slow_stage(folder: Path, pause: float) -> str:
    waiting.FIRST_WORD, waiting.NEXT_WORD = 0.4, 0.4
    sys.stderr = io.StringIO()

    def sleep(context: StageContext) -> dict:
        time.sleep(pause)
        return {}

    go(folder, (Stage(name="data", run=sleep),))
    return sys.stderr.getvalue()


def test_a_rank_that_waits_says_for_whom_and_for_what(tmp_path):
    """The first of those that wait speaks for all, less and less often."""
    first, second, third = run_on_ranks(3, slow_stage, tmp_path, 2.0)
    assert first == third == ""
    words = [line.rpartition(":")[0] for line in second.splitlines()]
    assert set(words) == {"rank 1 and 1 more wait for rank 0, which does stage data"}, second
    assert 2 <= len(words) <= 4, "after 0.4, 0.8, 1.6 and 3.2 seconds"


def test_nobody_speaks_of_short_waits(tmp_path):
    assert run_on_ranks(2, slow_stage, tmp_path, 0.0) == ["", ""]
