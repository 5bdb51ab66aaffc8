"""`watch`, on run folders that are written by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nemo_minitron.cli.main import app
from nemo_minitron.cli.watch import LEVELS, shown, sparkline
from nemo_minitron.config.load import load_recipe, to_yaml
from nemo_minitron.errors import RunFolderError
from nemo_minitron.stages.run_folder import RunFolder
from nemo_minitron.stages.snapshot import State, take

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny" / "tiny_cpu.yaml"
GIVEN = ["model.source=/models/tiny", "data.sources=[/data/text]"]
START = "2026-11-27T12:00:00+00:00"
NOON = 1795780800.0
"""The same moment in seconds since the epoch."""

HOLD = """
import sys
from pathlib import Path
from nemo_minitron.stages.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was at work in its distillation, at step 4 of 10, with 32 tokens per second and 64 a step."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    config = load_recipe(
        RECIPE, [*GIVEN, "distill.tokens=640", "distill.batch={sequence_length: 32, global_batch_size: 2}"]
    )
    folder.write_config(to_yaml(config))
    command = {"command": "nemo-minitron run tiny_cpu", "start": START, "end": None, "outcome": "running, or killed"}
    (folder.path / "manifest.json").write_text(json.dumps({"name": config.name, "commands": [command]}))
    for name in ("import", "data", "score", "prune"):
        folder.begin(name, {})
        folder.finish(name, {}, {"seconds": 2.5, "summary": f"{name} went well"})
    folder.begin("distill", {})
    rows = [{"stage": "distill", "step": 0, "tokens": 0, "val/loss": 2.0, "val/kl": 1.5}]
    for step, loss in enumerate((2.0, 1.75, 1.5, 1.25), start=1):
        trained = {"train/loss": loss, "train/tokens_per_second": 8.0 * step}
        rows.append({"stage": "distill", "step": step, "tokens": 64 * step, **trained})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder.metrics.write_text(text + '{"stage": "distill", "step": 5, "tok')  # cut off in the middle of a line
    return folder


def test_stages_training_and_time_left(run: RunFolder) -> None:
    found = take(run.path, now=NOON + 90)
    states = {stage.name: stage.state for stage in found.stages}
    assert states == {
        **dict.fromkeys(("import", "data", "score", "prune"), State.DONE),
        "distill": State.STOPPED,
        **dict.fromkeys(("evaluate", "export", "report"), State.WAITING),
    }
    assert found.stages[2].seconds == 2.5
    assert found.stages[2].summary == "score went well"
    assert (found.is_running, found.outcome, found.seconds) == (False, "killed", 90.0)
    training = found.training
    assert training is not None
    assert (training.stage, training.step, training.steps, training.tokens) == ("distill", 4, 10, 256)
    assert training.loss == ((1, 2.0), (2, 1.75), (3, 1.5), (4, 1.25))
    assert training.held_out == ((0, 1.5),)
    assert training.seconds_left == 6 * 64 / 32.0


def test_a_process_at_work_is_seen_and_its_end_too(run: RunFolder) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    found = take(run.path)
    holder.communicate("")
    assert found.is_running
    assert [stage.name for stage in found.stages if stage.state is State.WORKING] == ["distill"]
    assert not take(run.path).is_running


def test_a_finished_command_says_how_and_when_it_ended(run: RunFolder) -> None:
    record = json.loads((run.path / "manifest.json").read_text())
    record["commands"][-1].update(end="2026-11-27T12:01:10+00:00", outcome="finished")
    (run.path / "manifest.json").write_text(json.dumps(record))
    found = take(run.path, now=NOON + 9999)
    assert (found.outcome, found.seconds) == ("finished", 70.0)


def test_steps_of_a_budget_of_minutes_come_from_what_the_training_fixed(run: RunFolder) -> None:
    run.write_config(to_yaml(load_recipe(RECIPE, [*GIVEN, "distill.minutes=5"])))
    training = take(run.path).training
    assert training is not None
    assert training.steps is training.seconds_left is None
    (run.partial("distill") / "budget.json").write_text(json.dumps({"steps": 77}))
    training = take(run.path).training
    assert training is not None
    assert training.steps == 77


def test_what_a_terminal_of_eighty_columns_shows(run: RunFolder) -> None:
    console = Console(width=80, record=True, force_terminal=False)
    console.print(shown(take(run.path, now=NOON + 90)))
    text = console.export_text()
    assert "distill: step 4 of 10 · 256 tokens · 32 tokens/s" in text
    assert "loss            2 █▆▃▁ 1.25 at step 4" in text
    assert "left" not in text, "nothing is left to wait for where nobody works"
    assert max(map(len, text.splitlines())) <= 80


def test_once_prints_and_a_folder_without_a_run_is_an_error(run: RunFolder, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["watch", str(run.path), "--once"])
    assert done.exit_code == 0
    assert "step 4 of 10" in done.output
    with pytest.raises(RunFolderError, match="no run has begun here"):
        take(tmp_path)
    assert CliRunner().invoke(app, ["watch", str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([3.0], LEVELS[0]),
        ([1.0, 1.0], LEVELS[0] * 2),
        (list(range(8)), LEVELS),
        ([0.0, float("nan"), 7.0], f"{LEVELS[0]} {LEVELS[-1]}"),
    ],
)
def test_a_curve_goes_from_the_least_value_to_the_largest(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


def test_a_long_curve_is_averaged_to_the_width() -> None:
    assert sparkline([float(index // 100) for index in range(800)], width=8) == LEVELS
