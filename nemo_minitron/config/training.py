"""Settings of a training stage: batches, optimizer, schedule, checkpoints; the objective is in `distillation`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from nemo_minitron.config.base import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Section,
    Steps,
    in_steps,
)
from nemo_minitron.config.distillation import DistillationConfig, Objective, TeacherConfig


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    COSINE = "cosine"
    """Half a cosine from the peak down to `min_lr`."""
    LINEAR = "linear"
    """A straight line from the peak down to `min_lr`."""
    WSD = "wsd"
    """Warm-up, stable, decay (arXiv:2404.06395, section 4.2): the peak until the last `decay_fraction` of all steps,
    then a straight line down to `min_lr`. What was trained at the peak can be trained further."""
    CONSTANT = "constant"
    """The peak to the end."""


class FinishWith(StrEnum):
    """Which weights a training stage leaves."""

    LAST = "last"
    BEST = "best"


class BatchConfig(Section):
    """How tokens are grouped."""

    sequence_length: Count = 512
    """Tokens of one sample."""
    micro_batch_size: Count = 1
    """Samples of one forward pass on one rank."""
    global_batch_size: Count = 8
    """Samples of one optimizer step over all ranks."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.sequence_length * self.global_batch_size


class OptimizerConfig(Section):
    """AdamW (Megatron's, fp32 master weights) and its learning-rate schedule."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Where the schedule ends."""
    warmup_steps: Steps = 10
    """Optimizer steps of linear warm-up from zero; below 1, a fraction of all steps."""
    schedule: Schedule = Schedule.COSINE
    decay_fraction: Fraction = 0.2
    """Share of all steps in which schedule `wsd` goes down."""
    weight_decay: float = 0.1
    """Decoupled; norms and biases are left out."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    distributed: bool | None = None
    """Split optimizer states over data-parallel ranks (Megatron's distributed optimizer). None: on GPUs, where there
    are several data-parallel ranks."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr = {self.min_lr} must lie between 0 and lr = {self.lr}")
        return self


class GuardConfig(Section):
    """Steps that would do harm are skipped: weights, moments and step count of the optimizer stay as they were."""

    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A gradient norm above this many times the median of the last 32 is a spike; None: only what is not finite is
    skipped."""
    max_consecutive_skips: Count = 10
    """Training ends with an error after so many skipped steps in a row."""


class BudgetOf(StrEnum):
    """What a time budget is for."""

    STAGE = "stage"
    RUN = "run"


DEFAULT_TOKENS = 100_000


class TrainingConfig(Section):
    """What every training stage has."""

    tokens: Count | None = None
    """Tokens to train on, rounded down to complete steps; 100,000 if `minutes` is not given either."""
    minutes: Positive | None = None
    """Wall-clock minutes of the stage, instead of `tokens`: its own speed is measured at its start, and the number of
    steps that fit is fixed then. A resumed run keeps that number."""
    minutes_of: BudgetOf = BudgetOf.STAGE
    """What `minutes` are for: this stage, or the complete `run`, of which it takes what the other stages leave, and at
    least a quarter."""
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validate_every: Steps = 50
    """Optimizer steps between validations, or a fraction of all steps; 0 for none before the end."""
    validation_samples: Count = 16
    """Held-out samples of one validation."""
    checkpoint_every: Steps = 50
    """Optimizer steps between checkpoints that a stopped run resumes from, or a fraction of all steps; 0 for none."""
    keep_last: Count = 2
    """Newest checkpoints that are kept while training goes on; with 2, one is left if the newest is damaged."""
    async_save: bool = False
    """Write checkpoints while training goes on. Takes host memory for a copy of what each rank writes."""
    patience: NonNegative = 0
    """Training ends after so many validations in a row without a better value; 0 for never. The value is the KL to the
    teacher, or the cross-entropy where there is no KL in the loss."""
    finish_with: FinishWith = FinishWith.LAST
    """The weights after the last step, or those of the best validation."""
    guard: GuardConfig = GuardConfig()
    log_every: Count = 1
    """Optimizer steps between rows of metrics.jsonl."""

    @property
    def steps(self) -> int:
        """Optimizer steps.

        Raises:
            ValueError: The training has a time budget, whose steps are not fixed yet.
        """
        if self.tokens is None:
            raise ValueError("the number of steps is not known before the speed is measured")
        return self.tokens // self.batch.tokens_per_step

    @property
    def validation_interval(self) -> int:
        """Optimizer steps between validations; more than there are for none before the end."""
        return in_steps(self.validate_every, self.steps) or self.steps + 1

    @property
    def checkpoint_interval(self) -> int:
        """Optimizer steps between checkpoints; 0 for none."""
        return in_steps(self.checkpoint_every, self.steps)

    def with_steps(self, steps: int) -> Self:
        """The same training with its number of optimizer steps fixed."""
        return self.model_copy(update={"tokens": steps * self.batch.tokens_per_step, "minutes": None})

    @model_validator(mode="before")
    @classmethod
    def _tokens_or_minutes(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("minutes") is not None:
            return data
        return {**data, "tokens": DEFAULT_TOKENS if data.get("tokens") is None else data["tokens"]}

    @model_validator(mode="after")
    def _some_steps(self) -> Self:
        if self.minutes is not None:
            if self.tokens is not None:
                raise ValueError(f"tokens = {self.tokens} and minutes = {self.minutes:g}: give one of them")
            return self
        if self.steps < 1:
            raise ValueError(
                f"tokens = {self.tokens} is less than one step "
                f"(global_batch_size {self.batch.global_batch_size} x sequence_length {self.batch.sequence_length})"
            )
        return self

    @model_validator(mode="after")
    def _validated(self) -> Self:
        watched = {"patience": self.patience > 0, "finish_with: best": self.finish_with is FinishWith.BEST}
        if not self.validate_every and any(watched.values()):
            wanting = " and ".join(name for name, wanted in watched.items() if wanted)
            raise ValueError(f"{wanting} need validations while training (validate_every above 0)")
        return self


class DistillConfig(TrainingConfig, Objective, TeacherConfig):
    """A training on a teacher's targets: `Objective` is what is minimised, `TeacherConfig` how the teacher is held."""

    def with_teacher(self, teacher: Path) -> DistillationConfig:
        """What the student's model is told: the objective, and the teacher in memory."""
        return DistillationConfig(teacher=str(teacher), **self._shared(Objective, TeacherConfig))

    def with_cache(self, cache: Path) -> DistillationConfig:
        """What the student's model is told: the objective, and stored targets."""
        return DistillationConfig(cache=str(cache), **self._shared(Objective))

    def without_targets(self) -> DistillationConfig:
        """The objective alone, for a model that is given its targets later."""
        return DistillationConfig(**self._shared(Objective))

    def _shared(self, *kinds: type[Section]) -> dict[str, Any]:
        return {name: getattr(self, name) for kind in kinds for name in kind.model_fields}


class CorrectConfig(TrainingConfig):
    """Fine-tuning of the teacher on the distillation data with plain cross-entropy, before anything is scored.

    The student then learns from a teacher that knows its texts (arXiv:2408.11796, section 2: over 6 % less student
    loss). Batch and optimizer are those of `distill` where nothing else is said, with a fifth of its peak learning
    rate, as there.
    """


def correction_defaults(correct: dict[str, Any], distill: Any) -> dict[str, Any]:
    """What `correct` says, with what it leaves open taken from `distill` (both as the recipe has them)."""
    try:
        settings = DistillConfig.model_validate(distill or {})
    except ValidationError:
        return correct  # those problems are told where they are
    plain = settings.model_dump(mode="json")
    filled = {"batch": _over(plain["batch"], correct.get("batch"))}
    optimizer = _over({**plain["optimizer"], "lr": settings.optimizer.lr / 5}, correct.get("optimizer"))
    if isinstance(optimizer, dict) and isinstance(optimizer["lr"], int | float):
        given = correct.get("optimizer") or {}
        optimizer = {**optimizer, "min_lr": given.get("min_lr", min(optimizer["min_lr"], optimizer["lr"]))}
    return {**correct, **filled, "optimizer": optimizer}


def _over(defaults: dict[str, Any], given: Any) -> Any:
    return {**defaults, **given} if isinstance(given, dict) else (defaults if given is None else given)
