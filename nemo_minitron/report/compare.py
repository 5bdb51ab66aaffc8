"""Several runs on one page: sizes, perplexities, curves over one another, tasks, time, and where the recipes differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from nemo_minitron.arch.sizes import cut_sizes
from nemo_minitron.callbacks.reporter import compact, duration
from nemo_minitron.report import build, measured, tables
from nemo_minitron.report.content import ReportContent, Row
from nemo_minitron.report.curves import overlaid
from nemo_minitron.report.drawing import SERIES, Picture, legend, picture
from nemo_minitron.version import __version__

STUDENTS = ("tuned", "distilled", "pruned")
"""Which model stands for a run: the first of these that was measured."""
_MAX_TEXT = 80
_ABSENT = object()
_SAME = 1.005
"""Perplexities of one teacher on one text differ by less than this factor between layouts and dtypes."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One of the runs.

    Attributes:
        name: What tells it apart.
        content: What it came to.
        settings: Its recipe as dotted keys.
    """

    name: str
    content: ReportContent
    settings: Mapping[str, Any]

    @property
    def student(self) -> str | None:
        """Which of its models stands for it; None before it was evaluated."""
        return next((name for name in STUDENTS if name in self.content.perplexity), None)

    @property
    def ratio(self) -> float | None:
        """The student's held-out perplexity over the teacher's."""
        found = self.content.perplexity
        return None if self.student is None or "teacher" not in found else found[self.student] / found["teacher"]


def comparison(runs: Sequence[Compared]) -> str:
    """The page, one file without anything outside it."""
    found = [
        build.section("Sizes", _size_picture(runs), _sizes(runs)),
        build.section("Quality on held-out text", table=_quality(runs), note=_quality_note(runs)),
        *_curves(runs),
        *_tasks(runs),
        build.section("Time, cost and memory", table=_work(runs)),
        *_differences(runs),
        build.section("Where they come from", table=_origins(runs)),
    ]
    return build.render(
        "compare.html.j2",
        style=build.style(),
        names=[run.name for run in runs],
        tiles=_tiles(runs),
        sections=found,
        version=__version__,
    )


def _tiles(runs: Sequence[Compared]) -> list[Row]:
    """The best run in each respect."""
    tiles = []
    if measured_runs := [run for run in runs if run.ratio is not None]:
        best = min(measured_runs, key=lambda run: run.ratio or 0.0)
        tiles.append(tables.tile(f"{best.ratio:.2f} x", f"lowest perplexity against the teacher: {best.name}"))
    small = min(runs, key=lambda run: run.content.parameters["student"])
    count = compact(small.content.parameters["student"])
    tiles.append(tables.tile(count, f"fewest parameters: {small.name}"))
    if timed := [run for run in runs if run.content.seconds]:
        quick = min(timed, key=lambda run: sum(run.content.seconds.values()))
        seconds = duration(sum(quick.content.seconds.values()))
        tiles.append(tables.tile(seconds, f"shortest: {quick.name}"))
    return tiles


def _sizes(runs: Sequence[Compared]) -> Row:
    rows = []
    labels = dict.fromkeys(label for run in runs for label in cut_sizes(run.content.student))
    for run in runs:
        before, after = run.content.parameters["teacher"], run.content.parameters["student"]
        sizes = cut_sizes(run.content.student)
        found = (str(sizes.get(label, "")) for label in labels)
        rows.append((run.name, run.content.source, compact(after), f"{after / before:.1%}", *found))
    headings = ("run", "teacher", "parameters", "of the teacher's", *labels)
    return {"headings": headings, "rows": rows}


def _size_picture(runs: Sequence[Compared]) -> list[Row]:
    """Perplexity against the teacher over size, a point a run."""
    points = [(run.name, run.content.parameters["student"] / 1e6, run.ratio) for run in runs if run.ratio is not None]
    if not points:
        return []

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (name, parameters, ratio) in enumerate(points):
            axes.scatter([parameters], [ratio], s=36, color=SERIES[place % len(SERIES)], label=name, zorder=3)
        axes.set(xlabel="parameters of the student (millions)", ylabel="perplexity,\ntimes the teacher's")
        low, high = min(ratio for *_, ratio in points), max(ratio for *_, ratio in points)
        axes.set_ylim(low - max(0.15 * (high - low), 0.02), high + max(0.15 * (high - low), 0.02))
        axes.margins(x=0.15)
        legend(figure, *axes.get_legend_handles_labels())

    told = "; ".join(f"{name}: {count:.1f} million, {ratio:.2f} times the teacher's" for name, count, ratio in points)
    drawn: Picture = picture(draw, f"Points: perplexity over parameters. {told}.", height=2.9, narrow_height=3.4)
    return [build.figure("", "Lower left is better. Only runs of one teacher and one text can be compared.", drawn)]


def _quality(runs: Sequence[Compared]) -> Row:
    names = [name for name in ("teacher", *reversed(STUDENTS)) if any(name in run.content.perplexity for run in runs)]
    rows = []
    for run in runs:
        errors = run.content.results.get("evaluate", {}).get("standard_error", {})
        bits = run.content.results.get("evaluate", {}).get("bits_per_byte", {})
        cells = []
        for name in names:
            value = run.content.perplexity.get(name)
            error = f" ± {errors[name]:.2f}" if errors.get(name) else ""
            cells.append("" if value is None else f"{value:,.2f}{error}")
        rate = f"{bits[run.student]['value']:.4f}" if run.student in bits else ""
        ratio = "" if run.ratio is None else f"{run.ratio:.2f} x"
        rows.append((run.name, *cells, ratio, rate))
    return {"headings": ("run", *names, "against the teacher", "bits per byte (student)"), "rows": rows}


def _quality_note(runs: Sequence[Compared]) -> str:
    teachers = [value for run in runs if (value := run.content.perplexity.get("teacher")) is not None]
    differ = bool(teachers) and max(teachers) > _SAME * min(teachers)
    same = " The teacher's differ: not all runs were measured on the same text." if differ else ""
    return f"Held-out perplexity ± its standard error.{same}"


def _curves(runs: Sequence[Compared]) -> list[Row]:
    rows = {run.name: run.content.metrics for run in runs}
    if not any("val/ce" in row or "val/kl" in row for each in rows.values() for row in each):
        return []
    caption = "Validations along each distillation, on the run's own validation text."
    return [build.section("Distillation", [build.figure("", caption, overlaid(rows))])]


def _tasks(runs: Sequence[Compared]) -> list[Row]:
    """A row a task and model: the teachers, which should agree, and the students."""
    found = {run.name: run.content.results.get("evaluate", {}).get("tasks") or {} for run in runs}
    tasks = dict.fromkeys(task for models in found.values() for rows in models.values() for task in rows)
    if not tasks:
        return []
    rows = []
    for task in tasks:
        for name in ("teacher", *reversed(STUDENTS)):
            if any(task in models.get(name, {}) for models in found.values()):
                cells = (measured.task_cell(models, name, task) for models in found.values())
                rows.append((task, name, *cells))
    note = "Score ± standard error, and the percentage of the run's own teacher that is kept."
    return [build.section("Benchmark tasks", table={"headings": ("task", "model", *found), "rows": rows}, note=note)]


def _work(runs: Sequence[Compared]) -> Row:
    rows = []
    for run in runs:
        results = run.content.results
        peaks = [result["peak_memory_gb"] for result in results.values() if "peak_memory_gb" in result]
        tokens, speed = tables.tokens_trained(run.content), results.get("distill", {}).get("tokens_per_second")
        hours = sum(tables.device_hours(run.content, name, value) for name, value in run.content.seconds.items())
        kind = "GPU" if tables.on_gpus(run.content) else "core"
        rows.append(
            (
                run.name,
                duration(sum(run.content.seconds.values())),
                duration(run.content.seconds.get("distill", 0.0)),
                f"{hours:.3f} {kind}-hours",
                f"{tokens:,}" if tokens else "",
                f"{compact(speed)} tokens/s" if speed else "",
                f"{max(peaks):.2f} GB" if peaks else "",
            )
        )
    headings = ("run", "time in all", "distillation", "cost", "tokens", "speed", "peak memory (rank 0)")
    return {"headings": headings, "rows": rows}


def _differences(runs: Sequence[Compared]) -> list[Row]:
    """Keys of the recipes that are not the same in all of them."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = []
    for key in keys:
        values = [run.settings.get(key, _ABSENT) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((key, *("" if value is _ABSENT else _text(value) for value in values)))
    if not rows:
        return [build.section("The recipes", note="All of them are the same.")]
    table = {"headings": ("key", *(run.name for run in runs)), "rows": rows}
    return [build.section("Where the recipes differ", table=table)]


def _text(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " ..."


def _origins(runs: Sequence[Compared]) -> Row:
    rows = []
    for run in runs:
        known = dict(tables.provenance(run.content))
        known["commit"] = known["commit"][:12] if run.content.manifest.get("git") else ""
        commands = tables.commands(run.content)
        shown = [known.get(name, "") for name in ("seed", "commit", "machine", "precision", "started")]
        rows.append((run.name, *shown, commands[-1] if commands else ""))
    return {"headings": ("run", "seed", "commit", "machine", "precision", "started", "newest command"), "rows": rows}
