"""Python's garbage, collected on all ranks at the same step."""

import gc
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.config.parallel import ParallelConfig


class GarbageCollection(Callback):
    """Collects every so many optimizer steps, and keeps Python from doing so in between.

    A collection takes a rank tens of milliseconds. Where each rank makes its own when it happens to be due, all the
    others wait for it in the next collective, so a step of many ranks nearly always waits for some.

    Args:
        interval: Optimizer steps between collections, 1 or more.
    """

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"interval = {interval}: at least 1")
        self.interval = interval
        self._was_on = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin clean, and take over."""
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect when it is time."""
        if trainer.global_step % self.interval == 0:
            gc.collect()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it to Python again."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._release()

    def _release(self) -> None:
        if self._was_on:
            gc.enable()


def interval_of(wanted: int | None, *, on_gpu: bool, ranks: int) -> int:
    """Steps between collections where `parallel.gc_interval` may leave it open; 0 for none of ours."""
    if wanted is not None:
        return wanted
    return 100 if on_gpu and ranks > 1 else 0


def garbage_collection(parallel: ParallelConfig, *, ranks: int) -> list[Callback]:
    """The callback that `parallel.gc_interval` asks for on this machine; none where Python is left to itself."""
    interval = interval_of(parallel.gc_interval, on_gpu=torch.cuda.is_available(), ranks=ranks)
    return [GarbageCollection(interval)] if interval else []
