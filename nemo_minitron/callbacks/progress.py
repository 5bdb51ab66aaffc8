"""Progress of training, and of validation alone, through a `Reporter`."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.callbacks.reporter import Progress, Reporter, compact

HELD_OUT = (("val/kl", "held-out KL"), ("val/ce", "held-out CE"))
"""The first that is measured is shown."""


class ProgressDisplay(Callback):
    """Steps of training, or batches of `trainer.validate`, as a bar on a terminal and lines in a log.

    Loss, learning rate and tokens/s are those of the step that was just done. What the latest validation measured stays
    beside them with its step, as in `held-out KL 0.845 at step 80`.
    """

    def __init__(self, reporter: Reporter, label: str) -> None:
        self.reporter = reporter
        self.label = label
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._held_out: dict[str, str] = {}
        self._validation_started = 0.0
        self._validation_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the display at the step that training starts from."""
        self._open(total=trainer.max_steps, unit="steps", done=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step further; the validations that are still to come are part of what is left."""
        if self._progress is not None:
            self._progress.seconds_ahead = self._validation_seconds * _validations_left(trainer)
            self._progress.advance(fields=_fields(trainer, self._held_out))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a display for a validation on its own; one inside training is short, and training's stays."""
        self._validation_started = time.monotonic()
        if trainer.state.fn == "validate" and self._progress is None:
            self._open(total=int(sum(trainer.num_val_batches)), unit="batches")

    def on_validation_batch_end(  # noqa: PLR0917
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One batch further."""
        if trainer.state.fn == "validate" and self._progress is not None:
            self._progress.advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what it measured, time it, and keep it out of the pace of training."""
        if not trainer.sanity_checking:
            self._held_out = _held_out(trainer)
        self._validation_seconds = time.monotonic() - self._validation_started
        if trainer.state.fn == "fit" and self._progress is not None:
            self._progress.pause(self._validation_seconds)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the display."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the display before an error is shown."""
        self._close()

    def _open(self, *, total: int, unit: str, done: int = 0) -> None:
        self._progress = self._stack.enter_context(
            self.reporter.progress(self.label, total=total, unit=unit, done=done)
        )

    def _close(self) -> None:
        self._progress = None
        self._stack.close()


def _validations_left(trainer: Trainer) -> int:
    """Those between the steps that are left, and one at the end."""
    every = trainer.val_check_batch
    if not isinstance(every, int) or not 0 < every < float("inf"):
        return 1
    return -(-trainer.max_steps // every) - trainer.global_step // every


def _held_out(trainer: Trainer) -> dict[str, str]:
    """What the validation that has just ended measured, and at which step."""
    for key, name in HELD_OUT:
        if key in trainer.callback_metrics:
            return {name: f"{float(trainer.callback_metrics[key]):.3f} at step {trainer.global_step}"}
    return {}


def _fields(trainer: Trainer, held_out: Mapping[str, str]) -> dict[str, str]:
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
    fields = {"loss": f"{metrics['train/loss']:.3f}"} if "train/loss" in metrics else {}
    fields |= held_out
    if "train/lr" in metrics:
        fields["lr"] = f"{metrics['train/lr']:.1e}"
    if "train/tokens_per_second" in metrics:
        fields[f"{compact(metrics['train/tokens_per_second'])} tokens/s"] = ""
    return fields
