"""What a run folder says of a run while it goes on. Reads only, and needs neither torch nor the process at work."""

import fcntl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.errors import RunFolderError
from nemo_minitron.json_lines import read_rows
from nemo_minitron.stages import budget, manifest
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.files import read_json
from nemo_minitron.stages.run_folder import ATTEMPT, RunFolder


class State(StrEnum):
    """Where a stage is."""

    DONE = "done"
    WORKING = "working"
    STOPPED = "stopped"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage.

    Attributes:
        name: As in the chain.
        state: Where it is.
        seconds: It took, or has taken so far; None if it has not begun.
        summary: Its result in a line.
    """

    name: str
    state: State
    seconds: float | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True)
class TrainingView:
    """The training that is going on, or the newest one.

    Attributes:
        stage: Its stage.
        step: The newest one that was logged.
        steps: All of them; None where a budget of minutes has not been turned into steps yet.
        tokens: Seen.
        tokens_per_second: Of the newest step.
        loss: Of logged steps, oldest first: step and value.
        held_out: Of validations: step, and KL to the teacher (or the loss where there is no teacher).
        seconds_left: By the newest speed; None where it is unknown.
    """

    stage: str
    step: int
    steps: int | None
    tokens: int
    tokens_per_second: float | None
    loss: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        name: Of the recipe.
        path: The run folder.
        is_running: Whether a process works there now.
        outcome: How the newest command ended, as the manifest says.
        seconds: Since the newest command began, until it ended.
        stages: In order.
        training: None before the first step.
    """

    name: str
    path: Path
    is_running: bool
    outcome: str
    seconds: float
    stages: tuple[StageView, ...]
    training: TrainingView | None


def take(path: Path, *, now: float | None = None) -> Snapshot:
    """Read a run folder.

    Args:
        path: The folder.
        now: Seconds since the epoch; None for the clock.

    Raises:
        RunFolderError: It is no run folder, or its recipe cannot be read.
    """
    run, moment = RunFolder(path), time.time() if now is None else now
    record, resolved = manifest.read(run.path), run.path / "config.resolved.yaml"
    if not record.get("commands") or not resolved.is_file():
        raise RunFolderError(
            f"{run.path}: no run has begun here",
            rule="a run folder holds manifest.json and config.resolved.yaml",
            remedy="name the folder that `nemo-minitron run` printed, or that --run-dir gave",
        )
    config, command = load_recipe(resolved), record["commands"][-1]
    running = is_at_work(run)
    ended = moment if running or command["end"] is None else _seconds(command["end"])
    stages = tuple(_stage(run, stage.name, running=running, now=moment) for stage in chain_for(config))
    outcome = "running" if running else str(command["outcome"])
    return Snapshot(
        name=str(record["name"]),
        path=run.path,
        is_running=running,
        outcome="killed" if outcome == "running, or killed" else outcome,
        seconds=max(0.0, ended - _seconds(command["start"])),
        stages=stages,
        training=_training(run, config, [stage.name for stage in stages if stage.state is not State.WAITING]),
    )


def is_at_work(run: RunFolder) -> bool:
    """Whether a process on this machine, or one whose locks this file system shows, holds the folder."""
    path = run.stages / ".lock"
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _stage(run: RunFolder, name: str, *, running: bool, now: float) -> StageView:
    if run.is_complete(name):
        result = run.result(name)
        return StageView(name, State.DONE, result.get("seconds"), str(result.get("summary", "")))
    attempt = run.partial(name) / ATTEMPT
    if attempt.is_file():
        state = State.WORKING if running else State.STOPPED
        return StageView(name, state, max(0.0, now - attempt.stat().st_mtime) if running else None)
    return StageView(name, State.WAITING)


def _training(run: RunFolder, config: RunConfig, begun: list[str]) -> TrainingView | None:
    rows = [row for row in read_rows(run.metrics) if row.get("stage") in begun]
    if not rows:
        return None
    stage = str(rows[-1]["stage"])
    rows = [row for row in rows if row["stage"] == stage]
    trained = [row for row in rows if "train/loss" in row]
    validated = [row for row in rows if "val/loss" in row]
    newest = max(rows, key=lambda row: row["step"])
    speed = float(trained[-1]["train/tokens_per_second"]) if trained else None
    steps, per_step = _planned(run, config, stage)
    step, left = int(newest["step"]), None
    if steps is not None and speed and per_step:
        left = (steps - step) * per_step / speed
    held_out = "val/kl" if any("val/kl" in row for row in validated) else "val/loss"
    return TrainingView(
        stage=stage,
        step=step,
        steps=steps,
        tokens=int(newest["tokens"]),
        tokens_per_second=speed,
        loss=tuple((int(row["step"]), float(row["train/loss"])) for row in trained),
        held_out=tuple((int(row["step"]), float(row[held_out])) for row in validated if held_out in row),
        seconds_left=left,
    )


def _planned(run: RunFolder, config: RunConfig, stage: str) -> tuple[int | None, int | None]:
    """Steps of a training, and tokens of a step."""
    section = getattr(config, stage.partition(".")[0], None)
    if not isinstance(section, TrainingConfig):
        return None, None
    tokens = section.batch.tokens_per_step
    if section.minutes is None:
        return section.steps, tokens
    for folder in (run.partial(stage), run.stages / stage):
        if (folder / budget.FILE).is_file():
            return int(read_json(folder / budget.FILE)["steps"]), tokens
    if run.is_complete(stage):
        return int(run.result(stage)["steps"]), tokens
    return None, tokens


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).astimezone(UTC).timestamp()
