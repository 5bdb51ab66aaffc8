"""Watches how close a student is to its teacher while it learns."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from nemo_minitron.callbacks.history import ValidationHistory
from nemo_minitron.errors import MinitronError
from nemo_minitron.models.distillation import MegatronGPTDistillationModel

NAMES = ("kl", "ce", "teacher_ce", "agreement", "hidden")


class DistillationMonitor(ValidationHistory):
    """Keeps KL, both cross-entropies, top-1 agreement and hidden loss over the course of training.

    Args:
        every_n_steps: Also take them on the training batch every so many steps (one more pass over the logits);
            0 for validations only.

    Attributes:
        history: One row a measurement: `step`, `source` (`train` or `val`), and the values in nats per token
            (`agreement`: share of tokens; `hidden`: loss of intermediate states, where some are compared).
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        super().__init__(NAMES)
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model without a teacher, and tell it which steps are watched."""
        if not isinstance(pl_module, MegatronGPTDistillationModel):
            raise MinitronError(
                f"DistillationMonitor: {type(pl_module).__name__} has no teacher",
                rule="it watches a MegatronGPTDistillationModel",
            )
        pl_module.statistics_every = self.every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what a watched step measured."""
        if self.every_n_steps > 0 and (trainer.global_step - 1) % self.every_n_steps == 0:
            self.keep(trainer, "train")
