"""`nemo-minitron latency`: time layers on this machine, for budgets of latency."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.failures import reported


def latency(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Its teacher, target.deployment and search.space say what to time.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the table goes.")] = Path(
        "latency.json"
    ),
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.")] = False,
) -> None:
    """Time layers of several sizes on this device, so that a search can keep to a latency."""
    with reported(debug=debug):
        from nemo_minitron.callbacks.reporter import Reporter
        from nemo_minitron.cli.job import Job
        from nemo_minitron.errors import ConfigError
        from nemo_minitron.search.latency import Conditions
        from nemo_minitron.search.space import make_space
        from nemo_minitron.search.timing import TIMED, device_name, grid_of, points_of, time_table
        from nemo_minitron.stages import preflight
        from nemo_minitron.stages.run_folder import RunFolder

        job = Job(recipe=recipe, overrides=overrides or [])
        config = job.config()
        found = preflight.teacher_model(config, RunFolder(job.folder(config)))
        teacher = None if found is None else found[0]
        deployment = config.target.deployment
        problems = []
        if teacher is None:
            problems.append(f"model.source = {config.model.source}: its sizes are not known before it is fetched")
        elif teacher.has_experts:
            problems.append(f"model.source = {config.model.source}: latency tables hold layers without experts")
        if deployment.dtype not in TIMED:
            problems.append(f"target.deployment.dtype = {deployment.dtype}: only {', '.join(TIMED)} are timed")
        if teacher is None or problems:
            raise ConfigError(recipe, problems)
        space = make_space(config.search, config.target, teacher, config.parallel)
        conditions = Conditions.of(teacher, deployment, device_name())
        grid = grid_of(space)
        with Reporter().progress("latency", len(points_of(grid)), unit="points") as shown:
            table = time_table(conditions, grid, timed=shown.advance)
        table.save(output)
        error = table.error
        print(
            f"{conditions.device}, {conditions.dtype}: interpolation is off by {error['median']:.1%} (median) and "
            f"{error['max']:.1%} (max) on {error['shapes']:.0f} other shapes\n{output}"
        )
