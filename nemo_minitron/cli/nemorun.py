"""`nemorun minitron run recipe=RECIPE`: NeMo-Run finds it by the entry point group `nemo_run.cli`."""

import shlex
from pathlib import Path

import nemo_run

from nemo_minitron.cli.job import Job
from nemo_minitron.launchers.nemorun import experiment


@nemo_run.cli.entrypoint(namespace="minitron", type="experiment")  # type: ignore[untyped-decorator]
def run(ctx: nemo_run.cli.RunContext, recipe: str, overrides: str = "", folder: str = "") -> None:
    """Run a recipe, as its section `cluster` says.

    Args:
        ctx: Of NeMo-Run: `--dryrun`, `--detach`.
        recipe: A recipe file, or the name of a bundled one.
        overrides: Put on top of the recipe, as `seed=1 distill.tokens=1000000`; quoted as in a shell.
            (NeMo-Run takes a quote away that is the first or the last character.)
        folder: Where the run goes; runs/NAME if not given. (NeMo-Run keeps names that begin with run for itself.)
    """
    job = Job(recipe=recipe, overrides=shlex.split(overrides), run_dir=Path(folder) if folder else None)
    config = job.config()
    # The name of a bundled recipe holds in a container too, a path only with a mount.
    given = str(Path(recipe).absolute()) if Path(recipe).is_file() else recipe
    found = experiment(given, job.overrides, job.folder(config).absolute(), config)
    with found:
        if ctx.dryrun:
            found.dryrun()
        else:
            found.run(detach=ctx.detach, tail_logs=True)
