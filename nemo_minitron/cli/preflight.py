"""What can be known to fail later, said before anything is paid for: sizes, rounds, layout, export."""

from collections.abc import Iterable

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.cli.job import Job
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.run import RunConfig
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.plan import select
from nemo_minitron.stages.run_folder import RunFolder


def check(job: Job, config: RunConfig, folder: RunFolder) -> None:
    """Refuse what the recipe's later stages would refuse, as far as the teacher's sizes are known already.

    Raises:
        MinitronError: The recipe cannot run as it is.
    """
    selected = select(chain_for(config), first=job.redo_from, last=job.last, only=job.only)
    if all(folder.is_whole(stage.name) for stage in selected if stage.kind == "prune"):
        return  # nothing is pruned any more, or nothing at all
    teacher = teacher_spec(config, folder)
    if teacher is not None:
        check_models((teacher, *students(config, teacher)), config)


def teacher_spec(config: RunConfig, folder: RunFolder) -> ModelSpec | None:
    """The teacher's sizes, from stage import or from its own files; None when those are still to be fetched."""
    if folder.is_whole("import"):
        return ModelSpec.from_dict(folder.result("import")["spec"])
    from nemo_minitron.checkpoints.source import open_checkpoint
    from nemo_minitron.data.assets import location

    path = location(config.model.source)
    if config.model.source.startswith("package:") and not path.exists():
        return None
    return open_checkpoint(path).spec


def students(config: RunConfig, teacher: ModelSpec) -> tuple[ModelSpec, ...]:
    """The model after each round.

    Raises:
        PlanError: The target or the rounds on the way to it cannot be.
    """
    from nemo_minitron.pruning.rounds import round_specs

    return round_specs(config.target, teacher, config.steps)


def check_models(models: Iterable[ModelSpec], config: RunConfig) -> None:
    """Whether every model fits the layout, and the last one the export.

    Raises:
        LayoutError: A size does not divide.
        SpecError: The student cannot be exported as the recipe asks.
    """
    from nemo_minitron.stages.prune import check_export

    specs = tuple(models)
    for spec in specs:
        _check_layout(spec, config.parallel)
    check_export(config, specs[-1])


def _check_layout(spec: ModelSpec, parallel: ParallelConfig) -> None:
    from nemo_minitron.megatron.placement import check_layout

    check_layout(spec, parallel)
