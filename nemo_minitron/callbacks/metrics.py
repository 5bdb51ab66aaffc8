"""Training and validation metrics to `metrics.jsonl` and TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.callbacks.metrics_file import MetricsFile, Row
from nemo_minitron.callbacks.reporter import Reporter


class MetricsLogger(Callback):
    """Writes what the model logs under `train/` and `val/`, from one rank.

    One row per logged training step and one per validation: `step`, `tokens` (trained on so far), and the metrics.

    Args:
        files: `metrics.jsonl` files to write the same rows to.
        tensorboard: Folder for TensorBoard's event file, or None.
        tokens_per_step: Tokens of one optimizer step over all ranks.
        every_n_steps: Steps between rows of training metrics.
        last_step: A step that gets a row in any case.
        labels: Put into each row, as `{"stage": "distill"}`.
        reporter: Speaks if TensorBoard is not installed. A silent one (ranks above 0) writes no files.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        tensorboard: Path | None,
        tokens_per_step: int,
        every_n_steps: int = 1,
        last_step: int | None = None,
        labels: Row | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.every_n_steps = every_n_steps
        self.last_step = last_step
        self.labels = labels or {}
        self.reporter = reporter or Reporter()
        self._files = [] if self.reporter.silent else [MetricsFile(path) for path in files]
        self._board = None if self.reporter.silent or tensorboard is None else _TensorBoard(tensorboard, self.reporter)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step's row."""
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == self.last_step:
            self._write(trainer, "train/")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation's row."""
        if not trainer.sanity_checking:
            self._write(trainer, "val/")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bring everything to disk."""
        if self._board is not None:
            self._board.flush()

    def _write(self, trainer: Trainer, prefix: str) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(prefix)}
        step = trainer.global_step
        for file in self._files:
            file.write({**self.labels, "step": step, "tokens": step * self.tokens_per_step, **metrics})
        if self._board is not None:
            self._board.write(step, metrics)


class _TensorBoard:
    """An event file, made with the first value, so that steps of an attempt that was cut off can be purged."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self._folder = folder
        self._reporter = reporter
        self._writer: Any = None
        self._missing = False

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is None and not self._missing:
            self._open(step)
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _open(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._missing = True
            self._reporter.line("TensorBoard is not installed; metrics.jsonl has the same numbers")
            return
        self._writer = SummaryWriter(str(self._folder), purge_step=step)
