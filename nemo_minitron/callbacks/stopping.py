"""Training checkpoints: every so many steps, and when a signal asks for it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.callbacks.history import BestModel
from nemo_minitron.models.strategy import strategy_of


class SaveAndStop(Callback):
    """Saves regularly; after each step, if any rank was asked to stop, saves and ends.

    A step that a validation follows is saved before it: a run that goes on from there validates first.

    Args:
        requested: Whether this rank was asked to stop; polled after each step.
        stop: Called on every rank after the save; does not return.
        folder: Where checkpoints go.
        take_signals: Called when training starts, since Lightning puts its own signal handlers in place just before.
        every: Steps between checkpoints; 0 for none but the one before stopping.
        keep: Newest checkpoints to keep.
        best: Told when what it kept before can go.

    Put it behind the callbacks whose state a checkpoint shall hold as it is after the step. The strategy is a
    `MegatronStrategy`; what it writes while training goes on counts from the step at which it is complete.
    """

    def __init__(
        self,
        *,
        requested: Callable[[], bool],
        stop: Callable[[], NoReturn],
        folder: Path,
        take_signals: Callable[[], Any],
        every: int = 0,
        keep: int = 1,
        best: BestModel | None = None,
    ) -> None:
        self.requested = requested
        self.stop = stop
        self.folder = folder
        self.take_signals = take_signals
        self.every = every
        self.keep = keep
        self.best = best

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning."""
        self.take_signals()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide together with the other ranks: a signal may reach only some of them."""
        strategy = strategy_of(trainer)
        stopping = strategy.reduce_boolean_decision(self.requested(), all=False)
        strategy.finish_saving(wait=False)
        if stopping or (self.every and trainer.global_step % self.every == 0):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step:08d}.ckpt")
            if trainer.is_global_zero:
                self._tidy()
        if stopping:
            strategy.finish_saving(wait=True)
            self.stop()

    def _tidy(self) -> None:
        """Drop what is no longer needed. One that is still being written is not among those that are kept."""
        checkpoints = sorted(self.folder.glob("[0-9]*.ckpt"))
        for path in checkpoints[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        if self.best is not None:
            self.best.drop_others([int(path.stem) for path in checkpoints[-self.keep :]])
