"""What each stage of a recipe computes and holds on the GPUs (or processes) it is meant for."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from nemo_minitron.arch.layer import PARTS
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import Precision, Recompute
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import DistillConfig, TrainingConfig
from nemo_minitron.estimate.activations import Pass
from nemo_minitron.estimate.communication import Split
from nemo_minitron.estimate.compute import (
    PEAK_FLOPS,
    Duration,
    forward_flops,
    pipeline_bubble,
    training_flops,
)
from nemo_minitron.estimate.memory import RankMemory, Training, training_memory
from nemo_minitron.estimate.overlap import Exchange, Machine, communication
from nemo_minitron.pruning.scores import two_part_layers
from nemo_minitron.search.layerwise import layer_variants

BASELINES = 3
"""Candidates that `search.baselines` adds to the last rung."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one stage comes to.

    Attributes:
        tokens: Tokens that pass through its models, at most.
        flops: Operations, those that are done again included.
        bubble: Share of the time that a pipeline stage waits.
        minutes: Time budget of a training whose tokens only its speed decides; `tokens` and `flops` are then 0.
        section: Settings of a training; None for a stage that only runs models forward.
        model: The model in training.
        teacher: The teacher beside it in memory.
        training: What memory depends on.
    """

    tokens: int
    flops: float
    bubble: float = 0.0
    minutes: float | None = None
    section: TrainingConfig | None = None
    model: ModelSpec | None = None
    teacher: ModelSpec | None = None
    training: Training | None = None

    def memory(self, recompute: Recompute | None = None) -> tuple[RankMemory, ...]:
        """Bytes on a rank of each pipeline stage; with other activations computed again than the recipe says, if given.

        Empty for a stage that does not train.
        """
        if self.training is None or self.model is None:
            return ()
        training = self.training if recompute is None else self.training.recomputing(recompute)
        stages = range(training.step.parallel.pipeline)
        return tuple(training_memory(self.model, training, stage, teacher=self.teacher) for stage in stages)

    def communication(self, config: RunConfig) -> tuple[dict[Split, Exchange], ...]:
        """Seconds per step that a rank of each pipeline stage exchanges data on the recipe's cluster, by axis.

        Empty for a stage that does not train, and without a cluster.
        """
        cluster = config.cluster
        if self.training is None or self.model is None or cluster is None:
            return ()
        machine = Machine(gpu=cluster.gpu, gpus=cluster.gpus, gpus_per_node=cluster.gpus_per_node, mfu=cluster.mfu)
        stages = range(self.training.step.parallel.pipeline)
        return tuple(communication(self.model, self.training, stage, machine, teacher=self.teacher) for stage in stages)

    def duration(self, config: RunConfig) -> Duration | None:
        """How long it takes on the recipe's cluster; None without one.

        `cluster.mfu` is the share of the peak while a stage computes; the bubble comes on top. Communication that is
        not hidden (`communication`) would, too, unless the MFU is one that was measured with it.
        """
        cluster = config.cluster
        if cluster is None:
            return None
        mfu = cluster.mfu * (1 - self.bubble)
        return Duration(flops=self.flops, gpus=cluster.gpus, peak=PEAK_FLOPS[cluster.gpu], mfu=mfu)


def work_of(
    kind: str, number: int, config: RunConfig, teacher: ModelSpec, students: tuple[ModelSpec, ...], *, ranks: int
) -> Work | None:
    """The work of a stage, None for one that runs no model, or little.

    `kind` and `number` are those of a stage, as `distill` and its round, from 1; `students` are the models after
    each round.
    """
    before, student = list(pairwise((teacher, *students)))[number - 1]
    match kind:
        case "score" | "cache":
            return _scoring(config, before) if kind == "score" else _caching(config, teacher)
        case "search":
            return _search(config, teacher, student)
        case "correct":
            return _training(config.correct, config, teacher, None, ranks)
        case "distill":
            return _training(config.distill, config, student, None if config.cache else teacher, ranks)
        case "tune":
            watched = teacher if config.tune is not None and config.tune.kd_weight > 0 else None
            return _training(config.tune, config, students[-1], watched, ranks)
    return None


def _caching(config: RunConfig, teacher: ModelSpec) -> Work:
    tokens = config.distill.steps * config.distill.batch.tokens_per_step
    return Work(tokens=tokens, flops=tokens * forward_flops(teacher, config.distill.batch.sequence_length))


def _search(config: RunConfig, teacher: ModelSpec, student: ModelSpec) -> Work:
    """A race in which every candidate costs what `student` does, and all seeds, baselines and rungs take place."""
    search, distill = config.search, config.distill
    length = distill.batch.sequence_length
    trainings = [search.race_training(distill, rung) for rung in range(len(search.rungs))]
    measured, trained = search.candidates, 0
    for rung, training in zip(search.rungs, trainings, strict=True):
        last = rung is search.rungs[-1]
        extra = (BASELINES * search.baselines + (search.layerwise is not None)) if last else 0
        runs = (rung.candidates + extra) * (search.seeds if last else 1)
        trained += runs * training.steps * training.batch.tokens_per_step
        measured += runs
    cached = max((training.steps * training.batch.tokens_per_step for training in trainings), default=0)
    evaluated = measured * search.samples * length
    flops = cached * forward_flops(teacher, length) + evaluated * forward_flops(student, length)
    flops += trained * training_flops(student, length)
    if (layerwise := search.layerwise) is not None:
        forms = layer_variants(layerwise, config.target, teacher.layer, config.parallel)
        tokens = layerwise.samples * length
        passes = _replacing(teacher, length, (len(forms) - 1) * teacher.num_layers)
        flops += tokens * passes * forward_flops(teacher, length)
        evaluated += tokens
    return Work(tokens=cached + evaluated + trained, flops=flops)


def _replacing(model: ModelSpec, length: int, count: int) -> float:
    """Passes over the model that `count` replacements of a layer come to, spread evenly, and the model as it is.

    A replacement costs its layer, those behind it, and an output layer.
    """
    layers, head = model.num_layers, _head_share(model, length)
    return 1 + count * ((layers + 1) / (2 * layers) * (1 - head) + head)


def _head_share(model: ModelSpec, length: int) -> float:
    """The output layer's part of a pass."""
    return 2 * model.vocab_size * model.hidden_size / forward_flops(model, length)


def _scoring(config: RunConfig, model: ModelSpec) -> Work:
    score = config.score
    depth, layers = score.depth, model.num_layers
    passes = float(score.samples)
    if depth.metrics:
        # A candidate costs the layers behind its block, (L - n)(L - n + 1) / 2 layers for all blocks of n, and an
        # output layer, as does the complete model.
        head = _head_share(model, score.sequence_length)
        behind = sum((layers - n) * (layers - n + 1) / (2 * layers) for n in depth.lengths(layers))
        candidates = sum(layers - n + 1 for n in depth.lengths(layers))
        passes += min(depth.samples, score.samples) * (1 + behind * (1 - head) + candidates * head)
    if score.sublayers and (parts := len(PARTS) * len(two_part_layers(model))):
        passes += min(depth.samples, score.samples) * _replacing(model, score.sequence_length, parts)
    if config.target.merge_layers:
        passes += min(score.merge_samples, score.samples)
    tokens = score.samples * score.sequence_length
    return Work(tokens=tokens, flops=passes * score.sequence_length * forward_flops(model, score.sequence_length))


def _training(
    section: TrainingConfig | None, config: RunConfig, model: ModelSpec, teacher: ModelSpec | None, ranks: int
) -> Work | None:
    if section is None:
        return None
    batch, parallel = section.batch, config.parallel
    copies = max(ranks // parallel.model_parallel_size, 1)
    micro_batches = -(-batch.global_batch_size // (batch.micro_batch_size * copies))
    flops = training_flops(model, batch.sequence_length, recompute=parallel.recompute)
    if teacher is not None:
        flops += forward_flops(teacher, batch.sequence_length)
    bubble = pipeline_bubble(parallel, micro_batches)
    tokens = _tokens(section, config, flops, bubble)
    step = Pass(
        parallel=parallel,
        precision=config.precision,
        micro_batch_size=batch.micro_batch_size,
        sequence_length=batch.sequence_length,
        micro_batches=micro_batches,
        engine=config.cluster is not None and not model.needs_own_layers and config.precision is not Precision.FP32,
        gpu=config.cluster is not None,
    )
    return Work(
        tokens=tokens,
        flops=tokens * flops,
        bubble=bubble,
        minutes=None if tokens else section.minutes,
        section=section,
        model=model,
        teacher=teacher,
        training=replace(_memory_settings(section, config, step, copies), **_compared(section, model, teacher)),
    )


def _tokens(section: TrainingConfig, config: RunConfig, flops: float, bubble: float) -> int:
    """Tokens of a training; 0 for a time budget on a machine whose speed is not known.

    `flops` are of one token.
    """
    each = section.batch.tokens_per_step
    if section.minutes is None:
        return section.steps * each
    if (cluster := config.cluster) is None:
        return 0
    speed = cluster.gpus * PEAK_FLOPS[cluster.gpu] * cluster.mfu * (1 - bubble) / flops
    return int(speed * 60 * section.minutes) // each * each


def _compared(section: TrainingConfig, student: ModelSpec, teacher: ModelSpec | None) -> dict[str, Any]:
    """What a training with losses on intermediate states has more."""
    hidden = section.hidden if isinstance(section, DistillConfig) else None
    if hidden is None or teacher is None:
        return {}
    differ = teacher.hidden_size != student.hidden_size
    return {
        "compared": hidden.states(teacher.num_layers, student.num_layers)[0],
        "projection": differ if hidden.projection is None else hidden.projection,
    }


def _memory_settings(section: TrainingConfig, config: RunConfig, step: Pass, copies: int) -> Training:
    distill = section if isinstance(section, DistillConfig) else DistillConfig()
    return Training(
        step=step,
        data_parallel=copies,
        distributed_optimizer=copies * config.parallel.context > 1 and config.cluster is not None
        if section.optimizer.distributed is None
        else section.optimizer.distributed,
        freeze_embeddings=distill.freeze_embeddings,
        teacher_precision=distill.teacher_precision or config.precision,
        offload_teacher=distill.offload_teacher,
        chunk_tokens=distill.loss_chunk_tokens,
    )
