"""`nemo-minitron`: run a recipe, one stage of it, or look at recipes and the machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli import checkpoint, latency, plan, scores
from nemo_minitron.cli.failures import reported
from nemo_minitron.stages.chain import TITLES
from nemo_minitron.version import __version__

WHOLE, STAGES, AROUND = "The complete job", "One stage, with what it needs", "Recipes, plans and the machine"

app = typer.Typer(
    name="nemo-minitron",
    help="Make a large language model small: prune what matters least, then distill from the unpruned model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that `ls` shows.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Put on top of the recipe, as distill.tokens=1000000."),
]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", metavar="DIR", help="Where the run goes. (default: runs/NAME)", show_default=False),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--nproc", min=1, metavar="N", help="Processes to start here. (default: TP x PP x CP)", show_default=False
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show sizes, memory, time and the command; run and write nothing.")
]
Redo = Annotated[bool, typer.Option("--redo", help="Do it again, though it is done.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks, and every library's own messages.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command(rich_help_panel=WHOLE)
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Redo this stage and all after it.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Stop after this stage.")] = None,
    nproc: Ranks = None,
    debug: Debug = False,
) -> None:
    """Run all stages of a recipe. The same command again goes on where it stopped.

    Inside torchrun or srun, this process is one rank of the job.
    """
    _go(recipe, overrides, run_dir, nproc, dry_run=dry_run, debug=debug, redo_from=first, last=last)


@app.command(rich_help_panel=WHOLE)
def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    run_dir: RunDir = None,
    only_print: Annotated[bool, typer.Option("--print", help="Print the batch file; write and queue nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Queue a recipe as a Slurm job, as its section `cluster` says. The batch file stays in the run folder."""
    with reported(debug=debug):
        from nemo_minitron.cli.job import Job
        from nemo_minitron.cli.job import submit as queue

        print(queue(Job(recipe=recipe, overrides=overrides or [], run_dir=run_dir), only_print=only_print), end="")


@app.command(rich_help_panel=WHOLE)
def demo(overrides: Overrides = None, run_dir: RunDir = None, nproc: Ranks = None, debug: Debug = False) -> None:
    """Prune and distill SmolLM2-135M on this machine: a real model, about ten minutes on two cores."""
    _go("smollm2/demo", overrides, run_dir or Path("runs/demo"), nproc, debug=debug)


def _verb(name: str) -> Callable[..., None]:
    def verb(
        recipe: RecipeName,
        overrides: Overrides = None,
        *,
        run_dir: RunDir = None,
        dry_run: DryRun = False,
        redo: Redo = False,
        nproc: Ranks = None,
        debug: Debug = False,
    ) -> None:
        redo_from = name if redo else None
        _go(recipe, overrides, run_dir, nproc, dry_run=dry_run, debug=debug, redo_from=redo_from, only=name)

    return verb


def _evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Tasks of the LM-Evaluation-Harness; short for evaluate.tasks=[NAME,...].",
        ),
    ] = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    redo: Redo = False,
    nproc: Ranks = None,
    debug: Debug = False,
) -> None:
    """The stage verb that takes tasks too."""
    named = [] if tasks is None else [f"evaluate.tasks=[{tasks}]"]
    redo_from = "evaluate" if redo else None
    all_overrides = [*(overrides or []), *named]
    _go(recipe, all_overrides, run_dir, nproc, dry_run=dry_run, debug=debug, redo_from=redo_from, only="evaluate")


def _report(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE|RUN]...", help="Put on top of the recipe; or more runs, to compare them."),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where the page on RUN... goes. (default: RUN/report.html, of several comparison.html)",
            show_default=False,
        ),
    ] = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    redo: Redo = False,
    nproc: Ranks = None,
    debug: Debug = False,
) -> None:
    """The stage verb that takes run folders too."""
    with reported(debug=debug):
        from nemo_minitron.cli import report as pages
        from nemo_minitron.errors import ConfigError

        if folders := pages.folders([recipe, *(overrides or [])]):
            if dry_run or redo or run_dir or nproc:
                problem = "--dry-run, --redo, --run-dir and --nproc go with a recipe, not with run folders"
                raise ConfigError("command line", [problem])
            print(pages.report(folders, out))
            return
        if out is not None:
            raise ConfigError("command line", ["--out goes with run folders, not with a recipe"])
    redo_from = "report" if redo else None
    _go(recipe, overrides, run_dir, nproc, dry_run=dry_run, debug=debug, redo_from=redo_from, only="report")


for _name, _title in TITLES.items():
    _own = _report if _name == "report" else _evaluate if _name == "evaluate" else _verb(_name)
    _more = " Several run folders: compare them on one page." if _name == "report" else ""
    app.command(name=_name, help=_title + _more, rich_help_panel=STAGES)(_own)


app.command(rich_help_panel=AROUND)(checkpoint.convert)
app.command(rich_help_panel=AROUND)(checkpoint.inspect)
app.command(rich_help_panel=AROUND)(latency.latency)
app.add_typer(plan.app, name="plan", rich_help_panel=AROUND)
app.add_typer(scores.app, name="scores", rich_help_panel=AROUND)


@app.command(rich_help_panel=AROUND)
def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    *,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and return.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Between looks.")] = 2.0,
    debug: Debug = False,
) -> None:
    """Show a run while it goes on: its stages, the speed, the curves and the time left. Ends with the run."""
    with reported(debug=debug):
        from rich.console import Console

        from nemo_minitron.cli import watch as view

        view.watch(folder, once=once, every=every, console=Console())


@app.command(name="ls", rich_help_panel=AROUND)
def list_recipes() -> None:
    """List the recipes that come with the package."""
    with reported():
        from nemo_minitron.cli.recipes import bundled

        recipes = bundled()
        width = max((len(recipe.name) for recipe in recipes), default=0)
        for recipe in recipes:
            print(f"{recipe.name:<{width}}  {recipe.purpose}")


@app.command(name="cp", rich_help_panel=AROUND)
def copy_recipe(recipe: RecipeName, destination: Annotated[Path, typer.Argument(metavar="DEST")]) -> None:
    """Copy a recipe, to edit it."""
    with reported():
        from nemo_minitron.cli.recipes import copy

        print(copy(recipe, destination))


@app.command(rich_help_panel=AROUND)
def config(recipe: RecipeName, overrides: Overrides = None, debug: Debug = False) -> None:
    """Print a recipe with overrides and every default written out, or all that is wrong with it."""
    with reported(debug=debug):
        from nemo_minitron.cli.job import Job
        from nemo_minitron.config.load import to_yaml

        print(to_yaml(Job(recipe=recipe, overrides=overrides or []).config()), end="")


@app.command(rich_help_panel=AROUND)
def doctor(
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail for optional parts too; for container builds.")
    ] = False,
) -> None:
    """Say what is installed, what is missing, and what that costs."""
    with reported():
        from rich.console import Console

        from nemo_minitron.cli import doctor as examination

        doing = "imports each library in a process of its own, then asks the device to compute"
        with Console(stderr=True).status(doing):
            findings = examination.examine()
        examination.show(findings, Console())
        if not examination.healthy(findings, strict=strict):
            raise typer.Exit(2)


def _go(
    recipe: str,
    overrides: list[str] | None,
    run_dir: Path | None,
    ranks: int | None,
    *,
    dry_run: bool = False,
    debug: bool,
    redo_from: str | None = None,
    last: str | None = None,
    only: str | None = None,
) -> None:
    with reported(debug=debug):
        from nemo_minitron.cli.job import Job
        from nemo_minitron.cli.job import run as carry_out

        job = Job(
            recipe=recipe,
            overrides=overrides or [],
            run_dir=run_dir,
            redo_from=redo_from,
            last=last,
            only=only,
            ranks=ranks,
            debug=debug,
        )
        if not dry_run:
            raise typer.Exit(carry_out(job))
        from rich.console import Console

        from nemo_minitron.cli.dry_run import show

        show(job, console=Console())


def main() -> None:
    """The console script."""
    app()
