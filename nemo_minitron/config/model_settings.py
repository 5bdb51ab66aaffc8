"""What a model class is told besides its architecture: one frozen object, whichever door it came through."""

from nemo_minitron.config.base import DEFAULT_SEED, Count, NonNegative, Section
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import BatchConfig, GuardConfig, OptimizerConfig, TrainingConfig


class ModelSettings(Section):
    """Layout, dtype, batches, optimizer and objective of one model."""

    parallel: ParallelConfig = ParallelConfig()
    precision: Precision = Precision.FP32
    fp8: bool = False
    """Multiply weights in fp8; for a model that is not trained."""
    batch: BatchConfig = BatchConfig()
    """The model cuts global batches into micro-batches; the other sizes are the data module's."""
    seed: NonNegative = DEFAULT_SEED
    optimizer: OptimizerConfig | None = None
    """None for a model that is not trained."""
    schedule_steps: Count | None = None
    """Steps of the learning rate's schedule; None for those of the trainer."""
    constant_steps: NonNegative = 0
    """The last of them, which stay at `min_lr`."""
    guard: GuardConfig = GuardConfig()
    distillation: DistillationConfig | None = None
    """None for a model that has no teacher."""

    @classmethod
    def of_training(cls, training: TrainingConfig, distillation: DistillationConfig | None = None) -> "ModelSettings":
        """What a training stage says; layout, dtype and seed are the run's."""
        return cls(batch=training.batch, optimizer=training.optimizer, guard=training.guard, distillation=distillation)
