"""A few steps of a training, to measure what its parts cost on this machine; nothing of them remains."""

import shutil
import time
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from nemo_minitron.callbacks.throughput import Throughput
from nemo_minitron.megatron import runtime
from nemo_minitron.models.strategy import MegatronStrategy
from nemo_minitron.stages import signals
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.budget import Costs
from nemo_minitron.stages.processes import release_memory
from nemo_minitron.stages.session import make_trainer, restore
from nemo_minitron.stages.training_job import TrainingJob

MIN_STEPS = 2
"""Steps to time at least, after the first one, in which buffers are made."""
BUDGET_FRACTION = 0.02
"""Of the budget, to be timed at least: short steps vary."""
MAX_STEPS = 200


class Trial(Throughput):
    """Ends a training as soon as its speed is known.

    Args:
        tokens_per_step: Tokens of one optimizer step over all ranks.
        seconds: Of steps to be timed, at least.
        checkpoint: Where to write a training checkpoint at the end, to time it; None for none.

    Attributes:
        checkpoint_seconds: What that took.
    """

    def __init__(self, tokens_per_step: int, *, seconds: float, checkpoint: Path | None) -> None:
        super().__init__(tokens_per_step)
        self.checkpoint_seconds = 0.0
        self._enough = seconds
        self._checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning."""
        super().on_train_start(trainer, pl_module)
        signals.take()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the step; all ranks end together."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        is_enough = self.steps >= MIN_STEPS and self.seconds >= self._enough
        if trainer.strategy.reduce_boolean_decision(is_enough or signals.requested(), all=False):
            trainer.should_stop = True
            started = time.perf_counter()
            if self._checkpoint is not None:
                trainer.save_checkpoint(self._checkpoint)
                cast(MegatronStrategy, trainer.strategy).finish_saving(wait=True)
            self.checkpoint_seconds = time.perf_counter() - started


def measure(context: StageContext, job: TrainingJob, *, seconds: float) -> Costs:
    """Run some steps on a model of its own and forget it. Collective; every rank gets rank 0's figures.

    Args:
        context: Of the stage.
        job: The training, with a time budget.
        seconds: The budget.
    """
    settings = job.settings.model_copy(update={"validate_every": 0, "checkpoint_every": 0}).with_steps(MAX_STEPS)
    data = job.data.with_settings(settings)
    checkpoint = context.out / "trial.ckpt" if job.settings.checkpoint_every else None
    trial = Trial(settings.batch.tokens_per_step, seconds=BUDGET_FRACTION * seconds, checkpoint=checkpoint)
    trainer = make_trainer(
        context.config,
        [trial],
        max_steps=MAX_STEPS,
        max_epochs=-1,
        val_check_interval=MAX_STEPS + 1,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
    )
    clock = time.perf_counter()
    model = restore(
        job.kind,
        job.model,
        config=context.config,
        micro_batch_size=settings.batch.micro_batch_size,
        trainer=trainer,
        settings=job.model_settings,
    )
    start, clock = time.perf_counter() - clock, time.perf_counter()
    with signals.deferred():
        trainer.validate(model, datamodule=data, verbose=False)
        batch = time.perf_counter() - clock
        trainer.fit(model, datamodule=data)
    if trainer.strategy.reduce_boolean_decision(context.stop_requested(), all=False):
        context.stop()
    runtime.barrier()
    if context.rank == 0 and checkpoint is not None:
        shutil.rmtree(checkpoint)
    batches = -(-job.settings.validation_samples // settings.batch.global_batch_size)
    costs = Costs(
        step=trial.seconds / trial.steps,
        validation=batch * batches,
        checkpoint=trial.checkpoint_seconds,
        start=start,
    )
    del model, trainer
    release_memory()
    agreed: Costs = runtime.broadcast_object(costs)
    return agreed
