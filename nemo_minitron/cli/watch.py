"""`watch`: a run that is going on, in the terminal."""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nemo_minitron.callbacks.reporter import clock, compact, duration
from nemo_minitron.stages.snapshot import Snapshot, State, TrainingView, take

LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 60
"""Of a curve, in characters."""
_STYLES = {State.DONE: "green", State.WORKING: "bold cyan", State.STOPPED: "yellow", State.WAITING: "dim"}


def watch(folder: Path, *, once: bool, every: float, console: Console) -> None:
    """Show a run until it ends.

    A console that is no terminal is shown it once.
    """
    snapshot = take(folder)
    if once or not console.is_terminal:
        console.print(shown(snapshot))
        return
    with Live(shown(snapshot), console=console, auto_refresh=False) as live:
        while snapshot.is_running:
            time.sleep(every)
            snapshot = take(folder)
            live.update(shown(snapshot), refresh=True)


def shown(snapshot: Snapshot) -> RenderableType:
    """A snapshot for the terminal."""
    state = "running" if snapshot.is_running else snapshot.outcome
    head = Text.assemble((snapshot.name, "bold"), f"  {state}, {duration(snapshot.seconds)}  {snapshot.path}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("stage", "state", "time", "result"):
        table.add_column(title, justify="right" if title == "time" else "left", overflow="fold")
    for stage in snapshot.stages:
        seconds = "" if stage.seconds is None else duration(stage.seconds)
        table.add_row(stage.name, Text(stage.state.value, style=_STYLES[stage.state]), seconds, stage.summary)
    parts: list[RenderableType] = [head, table]
    if snapshot.training is not None:
        parts += [Text(), *_training(snapshot.training, is_running=snapshot.is_running)]
    report = snapshot.path / "report.html"
    if not snapshot.is_running and report.is_file():
        parts += [Text(), Text(f"report  {report}")]
    return Group(*parts)


def _training(training: TrainingView, *, is_running: bool) -> list[Text]:
    of = "" if training.steps is None else f" of {training.steps:,}"
    facts = [f"{training.stage}: step {training.step:,}{of}", f"{training.tokens:,} tokens"]
    if training.tokens_per_second is not None:
        facts.append(f"{compact(training.tokens_per_second)} tokens/s")
    if is_running and training.seconds_left:
        facts.append(f"about {clock(training.seconds_left)} left in this stage")
    lines = [Text(" · ".join(facts), style="bold")]
    for name, curve in (("loss", training.loss), ("held-out", training.held_out)):
        if curve:
            values = [value for _, value in curve]
            lines.append(
                Text(f"{name:9}{values[0]:8.4g} {sparkline(values)} {values[-1]:.4g} at step {curve[-1][0]:,}")
            )
    return lines


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Values as bars of eight heights, from the least to the largest one; means of neighbours where there are too many.

    Values that are not finite are gaps.
    """
    count = min(width, len(values))
    edges = [len(values) * index // count for index in range(count + 1)] if count else []
    means = [_mean(values[low:high]) for low, high in pairwise(edges)]
    finite = [value for value in means if value is not None]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    top = len(LEVELS) - 1
    return "".join(" " if x is None else LEVELS[round((x - low) / span * top) if span else 0] for x in means)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if abs(value) < float("inf")]
    return sum(finite) / len(finite) if finite else None
