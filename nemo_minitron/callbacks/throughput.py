"""How fast training goes."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Times optimizer steps: forward, backward and update, without waiting for data, validations or checkpoints.

    Logs `train/tokens_per_second` of each step. What it has counted goes into checkpoints, so that a resumed run tells
    the speed of all its steps.

    Args:
        tokens_per_step: Tokens of one optimizer step over all ranks.

    Attributes:
        steps: Steps timed so far, leaving out the first one of each attempt, in which buffers are made.
        seconds: What they took together.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.steps = 0
        self.seconds = 0.0
        self._started = 0.0
        self._first = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next step is the first of this attempt."""
        self._first = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock and log the step's speed."""
        seconds = time.perf_counter() - self._started
        if not self._first:
            self.steps += 1
            self.seconds += seconds
        self._first = False
        pl_module.log("train/tokens_per_second", self.tokens_per_step / seconds, batch_size=1, sync_dist=True)

    def summary(self) -> dict[str, float | None]:
        """Mean `tokens_per_second` and `step_seconds`; None before the second step."""
        if not self.steps:
            return {"tokens_per_second": None, "step_seconds": None}
        return {
            "tokens_per_second": round(self.steps * self.tokens_per_step / self.seconds, 2),
            "step_seconds": round(self.seconds / self.steps, 4),
        }

    def state_dict(self) -> dict[str, Any]:
        """Steps and seconds so far."""
        return {"steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.steps, self.seconds = state_dict["steps"], state_dict["seconds"]
