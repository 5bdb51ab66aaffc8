"""Carry out `run` and the stage verbs: read the recipe, join or start the other processes, run the chain, sum up."""

import sys
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.cli import launch, quiet, recipes, threads
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import LaunchError
from nemo_minitron.launchers.commands import check_ranks
from nemo_minitron.megatron import launched
from nemo_minitron.stages import signals
from nemo_minitron.stages.base import Stage
from nemo_minitron.stages.processes import environment_rank


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the user typed."""

    recipe: str
    overrides: list[str]
    run_dir: Path | None = None
    redo_from: str | None = None
    last: str | None = None
    only: str | None = None
    ranks: int | None = None
    """Processes to start; None for as many as the layout needs."""
    debug: bool = False

    def config(self) -> RunConfig:
        """The checked recipe with the overrides on top."""
        return load_recipe(recipes.find(self.recipe), self.overrides)

    def folder(self, config: RunConfig) -> Path:
        """Where the run goes."""
        return self.run_dir if self.run_dir is not None else Path("runs") / config.name


def run(job: Job) -> int:
    """Run a job in this process, or in as many as it needs; returns the exit status.

    Raises:
        MinitronError: Something the user can mend.
    """
    config = job.config()
    place = launched.find()
    size = place.world_size
    ranks = _ranks(job, config, place)
    if not place.by:
        _say_if_allocated(ranks)
        if job.ranks is None:
            _say_if_gpus_idle(ranks)
    if ranks > size:
        return launch.start(sys.argv[1:], ranks=ranks, run=job.folder(config))
    if not job.debug:
        quiet.install()
    if size == 1:  # others have been given their share by what has started them
        threads.choose()
    with signals.handled():  # loading the libraries takes a while
        _run_here(job, config)
    return 0


def submit(job: Job, *, only_print: bool = False) -> str:
    """Queue a job with Slurm; returns what Slurm says, or the batch file itself.

    Raises:
        MinitronError: The recipe cannot run as it is, or cannot be queued.
    """
    from nemo_minitron.launchers import slurm
    from nemo_minitron.stages import preflight
    from nemo_minitron.stages.run_folder import RunFolder

    config = job.config()
    folder = job.folder(config)
    script = slurm.batch_script(job.recipe, job.overrides, folder, config)
    if only_print:
        return script
    preflight.check(_selected(job, config), config, RunFolder(folder), recipe=job.recipe, redo_from=job.redo_from)
    return slurm.submit(script, folder)


def _ranks(job: Job, config: RunConfig, place: launched.Launched) -> int:
    """How many processes the job is for: those that are there already, those asked for, or those the layout needs.

    Raises:
        LaunchError: `--nproc` asks for another number than has been started.
        LayoutError: The layout does not fit that number.
    """
    launched.check_complete()
    one_task = place.by[:1] == ("SLURM_PROCID",) and place.world_size == 1  # a task may start ranks on its machine
    if job.ranks is not None and place.by and job.ranks != place.world_size and not one_task:
        alone = f"env {' '.join(f'-u {name}' for name in place.by)} nemo-minitron ... --nproc {job.ranks}"
        raise LaunchError(
            f"--nproc {job.ranks}, but this process is rank {place.rank} of {place.world_size} ({place.told})",
            rule="either a launcher (torchrun, srun) starts the ranks, or --nproc does",
            remedy=f"leave --nproc out; or, where no launcher is at work and the variables are left over: {alone}",
        )
    ranks = place.world_size if place.world_size > 1 else job.ranks or config.parallel.ranks
    check_ranks(ranks, config.parallel)
    return ranks


def _say_if_allocated(ranks: int) -> None:
    """In an allocation of more tasks, say what would use them all."""
    number, tasks = launched.allocated()
    if tasks > ranks:
        print(
            f"this shell is in Slurm's job {number} of {tasks} tasks, but is none of them: {ranks} process(es) run "
            f"here; for {tasks} ranks put `srun` before the command, without --nproc",
            file=sys.stderr,
            flush=True,
        )


def _say_if_gpus_idle(ranks: int) -> None:
    """Where there are GPUs for more copies of the model, say how to use them."""
    gpus = launched.visible_gpus()
    usable = gpus // ranks * ranks
    if usable > ranks:
        print(
            f"{ranks} process(es) for {gpus} visible GPUs; --nproc {usable} uses {usable} of them",
            file=sys.stderr,
            flush=True,
        )


def _run_here(job: Job, config: RunConfig) -> None:
    from nemo_minitron.callbacks.reporter import Reporter
    from nemo_minitron.cli import closing
    from nemo_minitron.stages import preflight
    from nemo_minitron.stages.chain import chain_for
    from nemo_minitron.stages.engine import Request, join_processes, run_chain
    from nemo_minitron.stages.run_folder import RunFolder

    folder = RunFolder(job.folder(config))
    selected = _selected(job, config)
    ranks = environment_rank()[1]
    preflight.check(selected, config, folder, recipe=job.recipe, ranks=ranks, redo_from=job.redo_from)
    processes = join_processes(config, folder)
    reporter = Reporter(silent=processes.rank > 0)
    reporter.line(closing.header(job.recipe, folder.path, config, ranks=processes.size))
    request = Request(config=config, run=folder, redo_from=job.redo_from, last=job.last, only=job.only)
    try:
        run_chain(chain_for(config), request, processes=processes, reporter=reporter)
    finally:
        _stop_runtime()
    reporter.line(closing.summary(folder, config))


def _selected(job: Job, config: RunConfig) -> tuple[Stage, ...]:
    """The stages that the user asks for."""
    from nemo_minitron.stages.chain import chain_for
    from nemo_minitron.stages.plan import select

    return tuple(select(chain_for(config), first=job.redo_from, last=job.last, only=job.only))


def _stop_runtime() -> None:
    """Take down what a stage or the processes started; a run that started nothing has not even imported it."""
    runtime = sys.modules.get("nemo_minitron.megatron.runtime")
    if runtime is not None:
        runtime.stop()
