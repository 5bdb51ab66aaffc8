"""Leave training when a signal asks for it, with a checkpoint to go on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class SaveAndStop(Callback):
    """After each step, if any rank was asked to stop: save a checkpoint and end.

    Args:
        requested: Whether this rank was asked; polled after each step.
        stop: Called on every rank after the save; must not return.
        folder: Where the checkpoint goes.
        take_signals: Called when training starts, since Lightning puts its own signal handlers in place just before.
    """

    def __init__(
        self,
        *,
        requested: Callable[[], bool],
        stop: Callable[[], None],
        folder: Path,
        take_signals: Callable[[], None],
    ) -> None:
        self.requested = requested
        self.stop = stop
        self.folder = folder
        self.take_signals = take_signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning."""
        self.take_signals()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide together with the other ranks: a signal may reach only some of them."""
        if trainer.strategy.reduce_boolean_decision(self.requested(), all=False):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step:08d}.ckpt")
            self.stop()
