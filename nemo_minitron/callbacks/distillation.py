"""Watches how close a student is to its teacher while it learns."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_minitron.errors import MinitronError
from nemo_minitron.models.distillation import MegatronGPTDistillationModel

NAMES = ("kl", "ce", "teacher_ce", "agreement")


class DistillationMonitor(Callback):
    """Keeps KL, both cross-entropies and top-1 agreement with the teacher over the course of training.

    Args:
        every_n_steps: Also take them on the training batch every so many steps (one more pass over the logits);
            0 for validations only.

    Attributes:
        history: One row a measurement: `step`, `source` (`train` or `val`), and the four values in nats a token
            (`agreement`: share of tokens).
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        self.every_n_steps = every_n_steps
        self.history: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: MegatronGPTDistillationModel, stage: str) -> None:
        """Refuse a model without a teacher."""
        if not isinstance(pl_module, MegatronGPTDistillationModel):
            raise MinitronError(
                f"DistillationMonitor: {type(pl_module).__name__} has no teacher",
                rule="it watches a MegatronGPTDistillationModel",
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: MegatronGPTDistillationModel, batch: Any, batch_idx: int
    ) -> None:
        """Switch the statistics on for the steps to be watched."""
        pl_module.statistics = self._watched(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: MegatronGPTDistillationModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what a watched step measured."""
        if self._watched(trainer.global_step - 1):
            self._keep(trainer, "train")
        pl_module.statistics = False

    def on_validation_end(self, trainer: Trainer, pl_module: MegatronGPTDistillationModel) -> None:
        """Keep what a validation measured."""
        if not trainer.sanity_checking:
            self._keep(trainer, "val")

    def state_dict(self) -> dict[str, Any]:
        """The history goes into checkpoints."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """And comes back."""
        self.history = list(state_dict["history"])

    def _watched(self, step: int) -> bool:
        return self.every_n_steps > 0 and step % self.every_n_steps == 0

    def _keep(self, trainer: Trainer, source: str) -> None:
        metrics = trainer.callback_metrics
        values = {name: metrics[f"{source}/{name}"].item() for name in NAMES if f"{source}/{name}" in metrics}
        self.history.append({"step": trainer.global_step, "source": source, **values})
