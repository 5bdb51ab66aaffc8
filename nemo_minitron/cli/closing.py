"""The first and the last lines of a run."""

from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.callbacks.reporter import compact, duration
from nemo_minitron.config.run import RunConfig
from nemo_minitron.report.measured import speed_table, task_table
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.run_folder import RunFolder
from nemo_minitron.version import __version__


def header(recipe: str, folder: Path, config: RunConfig, *, ranks: int) -> str:
    """What runs, and where it goes."""
    layout = ""
    if ranks > 1:
        sizes = config.parallel
        context = f" x CP {sizes.context}" if sizes.context > 1 else ""
        copies = ranks // sizes.model_parallel_size
        layout = f" · {ranks} ranks (TP {sizes.tensor} x PP {sizes.pipeline}{context} x DP {copies})"
    return f"nemo-minitron {__version__} · {recipe} · {shown(folder)}{layout}"


def summary(run: RunFolder, config: RunConfig) -> str:
    """Sizes, perplexities and where to look, as far as the run has come; nothing of models that it no longer has."""
    current = list(run.current([stage.name for stage in chain_for(config)]))
    lines = _table(run, current) if "evaluate" in current else []
    if "report" in current:
        lines.append(f"report   {shown(run.path / 'report.html')}")
    if "export" in current:
        files = run.result("export").get("files", {})
        lines.append("student  " + "  ".join(shown(run.stage("export") / name) for name in files.values()))
    return "\n" + "\n".join(lines) if lines else ""


def _table(run: RunFolder, stages: Sequence[str]) -> list[str]:
    evaluated = run.result("evaluate")
    perplexity: dict[str, float] = evaluated["perplexity"]
    sizes = run.result("prune")
    teacher, student = sizes["teacher_parameters"], sizes["parameters"]
    rows: list[tuple[str, str, str, str]] = [("", "parameters", "perplexity", "to teacher")]
    for name, value in perplexity.items():
        count = teacher if name == "teacher" else student
        ratio = "" if name == "teacher" else f"x {value / perplexity['teacher']:.2f}"
        rows.append((name, compact(count), f"{value:,.2f}", ratio))
    seconds = sum(float(run.result(name)["seconds"]) for name in stages)
    lines = [f"{a:<10}{b:>12}{c:>12}{d:>12}".rstrip() for a, b, c, d in rows]
    for name, table in (("tasks", task_table), ("speed", speed_table)):
        if found := evaluated.get(name):
            lines += ["", *_aligned(*table(found))]
    return [*lines, "", f"time     {duration(seconds)}"]


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table for the terminal: the first column to the left, the others to the right."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def shown(path: Path) -> str:
    """A path as a user would type it from here."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
