"""What can be known to fail later, said before anything is paid for: files, sizes, rounds, layout, batches, export."""

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.evaluation import EvaluateConfig
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.run import RunConfig, ScoreConfig
from nemo_minitron.config.training import DistillConfig, TrainingConfig
from nemo_minitron.errors import ConfigError, DataError, LayoutError, SpecError
from nemo_minitron.stages.base import Stage
from nemo_minitron.stages.plan import forced, redo_begun
from nemo_minitron.stages.run_folder import RunFolder

_FP8_POSITIONS = 8
"""Transformer Engine multiplies in fp8 where a rank has a multiple of so many positions."""


def check(
    stages: Sequence[Stage],
    config: RunConfig,
    folder: RunFolder,
    *,
    recipe: str,
    ranks: int | None = None,
    redo_from: str | None = None,
) -> None:
    """Refuse what later stages would refuse, as far as the teacher's sizes are known already.

    Args:
        stages: Those that were asked for.
        config: The recipe.
        folder: Where the run goes.
        recipe: What the user calls the recipe, for messages.
        ranks: Processes of the run; None for as many as the recipe is meant for.
        redo_from: The first of the stages that are done again, complete or not.

    Raises:
        MinitronError: The recipe cannot run as it is.
    """
    again = forced(stages, None if redo_begun(folder, redo_from, config) else redo_from)
    ahead = [stage for stage in stages if stage.name in again or not folder.is_complete(stage.name)]
    _check_sources(recipe, ahead, config)
    if any(stage.name in ("data", "tokenize_chat") for stage in ahead) and (problem := tokenizer_problem(config)):
        raise DataError(
            f"model.source = {config.model.source}: its tokenizer cannot be used: {problem}",
            rule="texts are tokenized by the model's own tokenizer",
            remedy="load it with transformers.AutoTokenizer and save_pretrained() it beside the weights",
        )
    check_tasks(ahead, config)
    check_batches(ahead, config, planned_ranks(config) if ranks is None else ranks)
    prunes = any(stage.kind == "prune" for stage in ahead)
    if not prunes and not _lengths(ahead, config):
        return  # nothing that depends on the model is left to do
    teacher = teacher_model(config, folder, again=again)
    if teacher is None:
        return
    spec, family = teacher
    check_lengths(ahead, config, spec)
    if prunes:
        check_models((spec, *students(config, spec, folder, again=again)), config, family)


def teacher_model(config: RunConfig, folder: RunFolder, *, again: Collection[str] = ()) -> tuple[ModelSpec, str] | None:
    """The teacher's architecture and family, from stage import, its own files, or `model.architecture`.

    Args:
        config: The recipe.
        folder: The run; what is finished there is believed.
        again: Stages that are done again, whose results are not.

    Returns:
        None when it is still to be fetched.

    Raises:
        SpecError: `model.architecture` describes another model than `model.source` is.
        MinitronError: Neither can be read.
    """
    if folder.is_complete("import") and "import" not in again:
        result = folder.result("import")
        return ModelSpec.from_dict(result["spec"]), result["family"]
    from nemo_minitron.checkpoints.hf import read_architecture, read_family
    from nemo_minitron.checkpoints.open import open_checkpoint

    architecture = config.model.architecture
    described = (
        None if architecture is None else (read_architecture(Path(architecture)), read_family(Path(architecture)))
    )
    if not source_is_here(config) and (described is not None or config.model.source.startswith("package:")):
        return described
    from nemo_minitron.data.assets import location

    found = open_checkpoint(location(config.model.source))
    if described is not None:
        _check_described(described[0], found.spec, config)
    return found.spec, found.family


def tokenizer_problem(config: RunConfig) -> str:
    """Why the teacher's tokenizer cannot be used; "" if it can, or if its files are not here yet."""
    if not source_is_here(config):
        return ""
    from nemo_minitron.checkpoints.open import open_checkpoint
    from nemo_minitron.checkpoints.summary import tokenizer_of
    from nemo_minitron.data.assets import location

    path = location(config.model.source)
    return tokenizer_of(open_checkpoint(path), path)[1]


def planned_ranks(config: RunConfig) -> int:
    """Processes that a recipe is meant for: the GPUs of its cluster, else one copy of the model."""
    return config.parallel.ranks if config.cluster is None else config.cluster.gpus


def source_is_here(config: RunConfig) -> bool:
    """Whether the teacher's weights lie on this machine."""
    from nemo_minitron.data.assets import location

    return location(config.model.source).exists()


def students(
    config: RunConfig, teacher: ModelSpec, folder: RunFolder | None = None, *, again: Collection[str] = ()
) -> tuple[ModelSpec, ...]:
    """The model after each round; under a budget one that fits it, until the search in the folder has chosen.

    A search that is done `again` has not chosen yet.

    Raises:
        PlanError: The target or the rounds on the way to it cannot be.
        SearchError: No shape fits the budgets.
    """
    from nemo_minitron.stages.students import students_of

    return students_of(config, teacher, None if "search" in again else folder)


def check_models(models: Iterable[ModelSpec], config: RunConfig, family: str) -> None:
    """Whether every model fits the layout, the layers to be compared exist, and the last model fits the export.

    Args:
        models: The teacher, and the student of each round.
        config: The recipe.
        family: Theirs.

    Raises:
        ConfigError: A pair of layers in `distill.hidden` does not exist, or a loss of routers is asked for where there
            are none.
        LayoutError: A size does not divide.
        SpecError: The student cannot be exported as the recipe asks.
    """
    from nemo_minitron.megatron.placement import check_layout
    from nemo_minitron.stages.prune import check_export

    specs = tuple(models)
    for spec in specs:
        check_layout(spec, config.parallel)
    _check_precision(config)
    if (hidden := config.distill.hidden) is not None:
        problems = [hidden.states(specs[0].num_layers, spec.num_layers)[1] for spec in specs[1:]]
        if any(problems):
            raise ConfigError("recipe", list(dict.fromkeys(chain.from_iterable(problems))))
    without_experts = [
        f"distill.{key} = {weight:g}: the model has no experts, and this is a loss on their routers"
        for key in ("router_weight", "balance_weight")
        if (weight := getattr(config.distill, key)) and not specs[-1].has_experts
    ]
    if without_experts:
        raise ConfigError("recipe", without_experts)
    if config.distill.balance_weight and (split := config.parallel.split_positions):
        raise ConfigError(
            "recipe",
            [
                f"distill.balance_weight = {config.distill.balance_weight:g}: {split} splits sequences, whose load it "
                f"balances one by one; leave one of the two out"
            ],
        )
    check_export(config, specs[-1], family)


def _check_precision(config: RunConfig) -> None:
    """Raise LayoutError where a cluster's GPUs would compute in fp32 what only Transformer Engine's layers can."""
    precisions = {"precision": config.precision, "distill.teacher_precision": config.distill.teacher_precision}
    asked = [key for key, precision in precisions.items() if precision is Precision.FP32]
    if config.cluster is not None and asked and (split := config.parallel.split_positions):
        raise LayoutError(
            f"{asked[0]} = fp32 with {split}",
            rule="positions are divided over ranks by Transformer Engine's layers, which compute in bf16",
            remedy=f"set {asked[0]}=bf16, or divide the model otherwise",
        )


def check_tasks(stages: Iterable[Stage], config: RunConfig) -> None:
    """Whether the tasks that stage evaluate will run are known here.

    Raises:
        MinitronError: The LM-Evaluation-Harness is not installed.
        ConfigError: With every task and folder that is not there.
    """
    if config.evaluate.tasks and any(stage.kind == "evaluate" for stage in stages):
        from nemo_minitron.evaluation import harness

        harness.check_tasks(config.evaluate.tasks, config.evaluate.include_path)


def check_lengths(stages: Iterable[Stage], config: RunConfig, teacher: ModelSpec) -> None:
    """Whether what the stages read fits into the model's context; it was never trained on the positions beyond.

    Raises:
        ConfigError: With every key that asks for more tokens.
    """
    limit = teacher.max_position_embeddings
    problems = [
        f"{key} = {length} is above the model's context of {limit} tokens (max_position_embeddings)"
        for key, length in _lengths(stages, config).items()
        if length > limit
    ]
    if problems:
        raise ConfigError("recipe", problems)


def _lengths(stages: Iterable[Stage], config: RunConfig) -> dict[str, int]:
    """Tokens of the sequences that the stages read, by key."""
    found: dict[str, int] = {}
    for kind in dict.fromkeys(stage.kind for stage in stages):
        section = getattr(config, kind, None)
        if isinstance(section, TrainingConfig):
            found[f"{kind}.batch.sequence_length"] = section.batch.sequence_length
        elif isinstance(section, ScoreConfig | EvaluateConfig):
            found[f"{kind}.sequence_length"] = section.sequence_length
            if isinstance(section, EvaluateConfig) and (speed := section.speed) is not None:
                found["evaluate.speed: prompt_tokens + new_tokens"] = speed.prompt_tokens + speed.new_tokens
    return found


def check_batches(stages: Iterable[Stage], config: RunConfig, ranks: int) -> None:
    """Whether every training's batch can be shared out over the copies of the model, and its sequences over ranks.

    Raises:
        LayoutError: Names the keys of all that cannot.
    """
    parallel = config.parallel
    copies = ranks // parallel.model_parallel_size
    if ranks % parallel.ranks:
        raise LayoutError(
            f"{ranks} ranks for {parallel.told}",
            rule=f"a multiple of {parallel.ranks}; what is left over is data parallel",
            remedy="change cluster.nodes, cluster.gpus_per_node or the sizes under parallel:",
        )
    problems: list[str] = []
    for kind in dict.fromkeys(stage.kind for stage in stages):
        section = getattr(config, kind, None)
        if isinstance(section, TrainingConfig):
            problems += _batch_problems(kind, section, config.parallel, copies)
            fp8 = isinstance(section, DistillConfig) and section.teacher_fp8
            problems += _length_problems(f"{kind}.batch", section.batch.sequence_length, config.parallel, fp8=fp8)
        elif isinstance(section, ScoreConfig | EvaluateConfig):
            problems += _length_problems(kind, section.sequence_length, config.parallel)
    if problems:
        raise LayoutError(
            "a batch cannot be shared out so: " + "; ".join(problems),
            rule=f"{copies} copies of the model take equally many complete micro-batches each",
            remedy="change the batch sizes, or the sizes under parallel:",
        )


def _batch_problems(kind: str, section: TrainingConfig, parallel: ParallelConfig, copies: int) -> list[str]:
    batch = section.batch
    micro_batches, left = divmod(batch.global_batch_size, batch.micro_batch_size * copies)
    if left:
        return [
            f"{kind}.batch.global_batch_size = {batch.global_batch_size} is not a multiple of "
            f"{kind}.batch.micro_batch_size {batch.micro_batch_size} x {copies} data-parallel copies"
        ]
    if parallel.virtual_pipeline is not None and micro_batches % parallel.pipeline:
        return [
            f"{kind}.batch gives {micro_batches} micro-batches a copy, with parallel.virtual_pipeline not a multiple "
            f"of parallel.pipeline = {parallel.pipeline}"
        ]
    return []


def _length_problems(section: str, length: int, parallel: ParallelConfig, *, fp8: bool = False) -> list[str]:
    shared = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    pieces = {
        "distill.teacher_fp8": _FP8_POSITIONS * shared if fp8 else 1,
        "parallel.context": 2 * parallel.context if parallel.context > 1 else 1,
        "parallel.sequence_parallel": parallel.tensor * parallel.context if parallel.sequence_parallel else 1,
    }
    return [
        f"{section}.sequence_length = {length} is not a multiple of {count}, which {key} needs"
        for key, count in pieces.items()
        if length % count
    ]


def _check_sources(recipe: str, ahead: Sequence[Stage], config: RunConfig) -> None:
    """Raises ConfigError, with every key that names a file that is not there."""
    from nemo_minitron.data.assets import location

    named: dict[str, tuple[str, tuple[str, ...]]] = {
        "import": ("model.source", (config.model.source,)),
        "data": ("data.sources", config.data.sources),
        "tokenize_chat": ("tune.sources", () if config.tune is None else config.tune.sources),
    }
    missing = [
        f"{key}: {path}: no such file or folder; {_remedy(key, path)}"
        for stage in ahead
        if stage.name in named
        for key, paths in (named[stage.name],)
        for path in paths
        if not path.startswith("package:") and not location(path).exists()
    ]
    if any(stage.name == "data" for stage in ahead):
        missing += _missing_prefixes(config)
    if missing:
        raise ConfigError(recipe, missing)


def _remedy(key: str, path: str) -> str:
    from nemo_minitron.checkpoints.open import hub_remedy  # loads torch

    by_hub = hub_remedy(path) if key == "model.source" else ""
    place = f"give its place on this machine, as {key}=..."
    return f"{by_hub}; or {place}" if by_hub else place


def _missing_prefixes(config: RunConfig) -> list[str]:
    data = config.data
    blends = {"blend": data.blend, "calibration_blend": data.calibration_blend, "heldout_blend": data.heldout_blend}
    return [
        f"data.{key}: {prefix}{suffix}: no such file; a prefix names a .bin and an .idx file"
        for key, pairs in blends.items()
        for _, prefix in pairs or ()
        for suffix in (".bin", ".idx")
        if not Path(f"{prefix}{suffix}").expanduser().is_file()
    ]


def _check_described(described: ModelSpec, found: ModelSpec, config: RunConfig) -> None:
    said, real = described.to_dict(), found.to_dict()
    # Revisions of one model differ in how far it reaches.
    differing = [
        f"{key} is {said.get(key)} in the one and {real.get(key)} in the other"
        for key in sorted((said.keys() | real.keys()) - {"max_position_embeddings"})
        if said.get(key) != real.get(key)
    ]
    if differing:
        raise SpecError(
            f"model.architecture = {config.model.architecture} does not describe model.source = "
            f"{config.model.source}: " + "; ".join(differing),
            rule="both are the same model",
            remedy="mend model.architecture, or leave it out: model.architecture=null",
        )
