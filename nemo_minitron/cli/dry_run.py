"""`--dry-run`: what a recipe comes to, before anything is paid for. Reads the model's configuration; writes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.text import Text

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.cli import dry_run_tables as tables
from nemo_minitron.cli import quiet
from nemo_minitron.cli.job import Job
from nemo_minitron.config.parallel import Precision, Recompute
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.estimate.memory import GPU_BYTES, USABLE
from nemo_minitron.estimate.work import Work, work_of
from nemo_minitron.launchers.commands import run_command
from nemo_minitron.stages import preflight
from nemo_minitron.stages.base import Stage
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.manifest import gpu_memory
from nemo_minitron.stages.plan import decide, forced, select
from nemo_minitron.stages.precision import foreseen
from nemo_minitron.stages.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A job with everything that is reckoned from."""

    config: RunConfig
    stages: Sequence[Stage]
    ranks: int
    teacher: ModelSpec
    family: str
    students: tuple[ModelSpec, ...]
    described: bool
    """Whether the teacher's sizes are those of `model.architecture` alone."""

    @property
    def models(self) -> dict[str, ModelSpec]:
        """The teacher and the model after each round; the last one is the student."""
        names = [f"round {number}" for number in range(1, len(self.students))]
        return {"teacher": self.teacher, **dict(zip([*names, "student"], self.students, strict=True))}

    def works(self) -> dict[str, Work]:
        """Stages that run models, by name."""
        found = {
            stage.name: work_of(stage.kind, stage.round, self.config, self.teacher, self.students, ranks=self.ranks)
            for stage in self.stages
        }
        return {name: work for name, work in found.items() if work is not None}


def show(job: Job, *, console: Console) -> None:
    """Print stages, sizes, layout, memory and time, and the command that would run.

    Raises:
        MinitronError: The recipe cannot run as it is; after all that can be said about it.
    """
    config = job.config()
    if not job.debug:
        quiet.install()
    folder = RunFolder(job.folder(config))
    precision, why = _precision(config, folder)
    config = config.model_copy(update={"precision": precision})
    chain = select(chain_for(config), first=job.redo_from, last=job.last, only=job.only)
    steps = decide(chain, config, folder, redo_from=job.redo_from)
    console.print(Text(f"run folder {folder.path}", style="bold"))
    console.print(Text("  ".join(f"{step.stage.name}: {step.action}" for step in steps)), highlight=False)
    console.print()
    again = forced(chain, job.redo_from)
    found = preflight.teacher_model(config, folder, again=again)
    if found is None:
        console.print(f"sizes: not known before {config.model.source.split('/')[0]} is fetched (stage import)")
        return
    teacher, family = found
    ranks = job.ranks or preflight.planned_ranks(config)
    if any(stage.kind == "search" for stage in chain):
        from nemo_minitron.cli import dry_run_search

        console.print(dry_run_search.tables(config, teacher, ranks=ranks), highlight=False)
    planned = _Job(
        config=config,
        stages=chain,
        ranks=ranks,
        teacher=teacher,
        family=family,
        students=preflight.students(config, teacher, folder, again=again),
        described=not folder.is_complete("import") and not preflight.source_is_here(config),
    )
    on_meta, problem = _built(planned)
    console.print(_tables(planned, on_meta), highlight=False)
    if problem is not None:
        raise problem
    lines = [_line("in", Text(f"{precision}{why}")), *_verdict(planned)]
    if not planned.described and preflight.source_is_here(config):
        problem_ = preflight.tokenizer_problem(config)
        words = (
            Text(f"cannot be used: {problem_}", style="bold red") if problem_ else Text("can be used", style="green")
        )
        lines.append(_line("tokens", words))
    if (job.redo_from, job.last, job.only) == (None, None, None):
        command = run_command(job.recipe, job.overrides, job.run_dir, config)
        lines.append(_line("run", Text(command, style="bold")))
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _precision(config: RunConfig, folder: RunFolder) -> tuple[Precision, str]:
    """What `precision: auto` will be where the recipe runs, and why."""
    if config.precision is not Precision.AUTO:
        return config.precision, ""
    if config.cluster is not None:
        return Precision.BF16, f" (auto: on {config.cluster.gpu.upper()} GPUs)"
    choice = foreseen(folder)
    return choice.chosen, f" (auto: {choice.reason})"


def _built(job: _Job) -> tuple[dict[str, list[int]], MinitronError | None]:
    """Parameters of each pipeline stage's rank by model, or why there cannot be such a run."""
    try:
        preflight.check_lengths(job.stages, job.config, job.teacher)
        preflight.check_models(job.models.values(), job.config, job.family)
        preflight.check_batches(job.stages, job.config, job.ranks)
        preflight.check_tasks(job.stages, job.config)
        return _parameters_on_meta(job), None
    except MinitronError as error:
        return {}, error


def _tables(job: _Job, on_meta: dict[str, list[int]]) -> RenderableType:
    works = job.works()
    trained = {name: work for name, work in works.items() if work.memory()}
    return Group(
        tables.sizes(job.models),
        tables.layout(job.models, job.config, ranks=job.ranks, on_meta=on_meta),
        *([tables.memory(trained, _memory(job.config, job.ranks)[0])] if trained else []),
        tables.work(job.stages, works, job.config),
        *([tables.communication(trained, job.config)] if trained and job.config.cluster is not None else []),
    )


def _parameters_on_meta(job: _Job) -> dict[str, list[int]]:
    """Of Megatron models built on `meta`."""
    from nemo_minitron.megatron.meta import build_on_meta

    parallel, precision = job.config.parallel, job.config.precision
    return {
        name: [
            sum(
                weight.numel()
                for chunk in build_on_meta(spec, parallel, stage, precision)
                for weight in chunk.parameters()
            )
            for stage in range(parallel.pipeline)
        ]
        for name, spec in job.models.items()
    }


def _verdict(job: _Job) -> list[Text]:
    """Whether it fits, how long it takes, what it costs."""
    works, config = job.works(), job.config
    lines = []
    if trained := {name: work for name, work in works.items() if work.memory()}:
        name = max(trained, key=lambda each: tables.fullest(trained[each])[1].total)
        lines.append(_line("fits", _fit(name, trained[name], config, job.ranks)))
    durations = [duration for work in works.values() if (duration := work.duration(config)) is not None]
    if durations and (cluster := config.cluster) is not None:
        hours, gpu_hours = sum(each.hours for each in durations), sum(each.gpu_hours for each in durations)
        days = f" ({hours / 24:.1f} days)" if hours >= 48 else ""
        on = f"on {cluster.gpus} {cluster.gpu.upper()} at MFU {cluster.mfu:.0%}, pipeline bubbles on top"
        lines.append(_line("takes", Text(f"{hours:,.1f} hours{days}, {gpu_hours:,.0f} GPU hours {on}")))
    if job.described:
        lines.append(_line("note", Text(f"{config.model.source} is not here: sizes are those of model.architecture")))
    return lines


def _fit(name: str, work: Work, config: RunConfig, ranks: int) -> Text:
    _, most = tables.fullest(work)
    usable, whose = _memory(config, ranks)
    room = f"{usable / 1e9:.1f} GB ({USABLE:.0%} of {whose})"
    needs = f"{name} needs {most.total / 1e9:.3g} GB per rank"
    if most.total <= usable:
        return Text(f"yes: {needs}, there are {room}", style="green")
    smaller = [kind for kind in Recompute if tables.fullest(work, kind)[1].total <= usable]
    remedy = f"parallel.recompute={smaller[0]} would do" if smaller else "raise parallel.tensor or parallel.pipeline"
    return Text(f"no: {needs}, there are {room}; {remedy}", style="bold red")


def _memory(config: RunConfig, ranks: int) -> tuple[float, str]:
    """Bytes that a rank can count on, and whose memory they are a part of."""
    if config.cluster is not None:
        return USABLE * GPU_BYTES[config.cluster.gpu], f"an {config.cluster.gpu.upper()}"
    if gpus := gpu_memory():
        name = "this machine's GPU" if ranks == 1 else f"a GPU; this machine has {len(gpus)} for {ranks} ranks"
        return USABLE * min(gpus[:ranks]), name
    import psutil

    return USABLE * float(psutil.virtual_memory().total) / ranks, f"this machine's memory over {ranks} rank(s)"


def _line(name: str, text: Text) -> Text:
    return Text(f"{name:<6} ", style="bold").append_text(text)
