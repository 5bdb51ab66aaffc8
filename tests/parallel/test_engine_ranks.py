"""The engine over two ranks: rank 0 decides and works, the others follow, and errors of rank 0 are everybody's."""

from pathlib import Path

from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.errors import DataError
from nemo_minitron.stages.base import Stage, StageContext
from nemo_minitron.stages.engine import Request, run_chain
from nemo_minitron.stages.run_folder import RunFolder
from nemo_minitron.stages.team import Ranks, is_echo
from tests.jobs import config_for
from tests.ranks import run_on_ranks


def go(folder: Path, chain: tuple[Stage, ...]) -> Ranks:
    config = config_for(folder, folder)
    team = Ranks(config.parallel, config.seed)
    run_chain(chain, Request(config=config, run=RunFolder(folder / "run")), team=team, reporter=Reporter(silent=True))
    return team


def note(context: StageContext) -> dict:
    (context.out / f"rank{context.rank}").touch()
    return {"sum": context.rank}


def two_stages(folder: Path) -> tuple[int, dict, dict]:
    team = go(
        folder, (Stage(name="import", run=note), Stage(name="score", run=note, collective=True, needs=("import",)))
    )
    run = RunFolder(folder / "run")
    files = {name: sorted(path.name for path in run.stage(name).glob("rank*")) for name in ("import", "score")}
    return team.rank, files, run.result("score")


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
        return str(error), is_echo(error)
    return "", False


def test_an_error_of_rank_zero_ends_all_and_only_rank_zero_shows_it(tmp_path):
    (first, first_echo), (second, second_echo) = run_on_ranks(2, failing_stage, tmp_path)
    assert first == second == "texts.txt: is empty\n  rule: some text\n  remedy: name another file"
    assert (first_echo, second_echo) == (False, True)
