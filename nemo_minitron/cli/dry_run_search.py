"""What a dry run says of a search: the space, the shapes that fit, and what the race costs."""

from rich.console import Group, RenderableType
from rich.text import Text

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.cli.dry_run_tables import new_table
from nemo_minitron.config.run import RunConfig
from nemo_minitron.estimate.work import BASELINES, Work, work_of
from nemo_minitron.search.axes import sizes_of
from nemo_minitron.search.measures import describe, table_row
from nemo_minitron.search.problem import SearchProblem
from nemo_minitron.search.space import ranges
from nemo_minitron.stages.outlook import expected_rate
from nemo_minitron.stages.students import posed


def tables(config: RunConfig, teacher: ModelSpec, *, ranks: int) -> RenderableType:
    """The search of a recipe.

    Raises:
        SearchError: No shape fits, or rules contradict each other.
    """
    problem = posed(config, teacher)
    return Group(_space(problem), _budgets(problem), _race(problem, ranks))


def _space(problem: SearchProblem) -> RenderableType:
    found = new_table("axis", "teacher", "sizes", "number", title="search space")
    teacher = sizes_of(problem.space.teacher)
    for axis, size, values in zip(problem.space.axes, teacher, problem.space.values, strict=True):
        found.add_row(axis.label, f"{size:,}", ranges(problem.space)[axis.key], f"{len(values):,}")
    return found


def _budgets(problem: SearchProblem) -> RenderableType:
    found = problem.found
    rows = new_table("budget", "limit", "teacher", "shapes above it", title="budgets")
    costs = table_row(problem.measured, sizes_of(problem.space.teacher))
    for name, limit in problem.limits.items():
        rows.add_row(name, describe(name, limit), describe(name, costs[name]), f"{found.above[name]:,}")
    unused = 1 - problem.config.search.tolerance
    told = (
        f"{found.total:,} combinations, {found.ruled_out:,} that no model can have, {found.below:,} that use no budget "
        f"to {unused:.0%}; {len(found.shapes):,} pass, {len(problem.candidates)} of them run"
    )
    return Group(rows, Text(told + "\n"))


def _race(problem: SearchProblem, ranks: int) -> RenderableType:
    config = problem.config
    search = config.search
    rows = new_table("rung", "candidates", "seeds", "tokens each", "at once", title="race")
    count = len(problem.candidates)
    measured = f"{search.samples * config.distill.batch.sequence_length:,}"
    rows.add_row("pruned", f"{count}", "", measured, f"{min(count, problem.groups(count, ranks))}")
    for number, (rung, training) in enumerate(zip(search.rungs, problem.trainings, strict=True), start=1):
        is_last = number == len(search.rungs)
        baselines = " + baselines" if search.baselines and is_last else ""
        count = min(rung.candidates, len(problem.candidates))
        seeds = search.seeds if is_last else 1
        tasks = seeds * (count + BASELINES * bool(baselines))
        at_once = min(tasks, problem.groups(tasks, ranks))
        rows.add_row(str(number), f"{count}{baselines}", str(seeds), f"{training.tokens:,}", f"{at_once}")
    teacher, student = problem.space.teacher, problem.spec(problem.candidates[0].sizes)
    work = work_of("search", 1, config, teacher, (student,), ranks=ranks)
    assert work is not None
    return Group(rows, Text(_cost(work, config, ranks) + "\n", style="bold"))


def _cost(work: Work, config: RunConfig, ranks: int) -> str:
    """Tokens and hours of the complete race."""
    tokens = f"the race passes over {work.tokens:,} tokens at most"
    if (duration := work.duration(config)) is not None:
        return f"{tokens}: {duration.hours:,.2f} hours, {duration.gpu_hours:,.0f} GPU hours at MFU {duration.mfu:.0%}"
    hours = work.flops / expected_rate(config.precision, ranks) / 3600
    return f"{tokens}: about {hours:.2g} hours on this machine"
