"""Training and validation metrics to `metrics.jsonl` and TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.callbacks.metrics_file import MetricsFile, Row
from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.json_lines import read_rows


class MetricsLogger(Callback):
    """Writes what the model logs under `train/` and `val/`, from one rank.

    One row per logged training step and one per validation: `step` (from 1; 0 is before training), `tokens` (read up to
    it, those of skipped steps included) and the metrics. A training row has the loss and the gradients of that step's
    batch under the weights before its update, and the learning rate of the update; a validation row has what the
    weights after it gave. The last step has a row in any case. A resumed training first removes the rows, and the
    values in TensorBoard, of steps that it does again.

    Args:
        files: `metrics.jsonl` files to write the same rows to.
        tensorboard: Folder for TensorBoard's event file, or None.
        tokens_per_step: Tokens of one optimizer step over all ranks.
        every_n_steps: Steps between rows of training metrics.
        last_step: The step after which training ends, if nothing ends it before.
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
        self._has_unwritten_step = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what an earlier attempt wrote of steps after the one that training goes on from."""
        for file in self._files:
            file.resume(self.labels.get("stage"), trainer.global_step)
        if self._board is not None:
            self._board.resume(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step's row."""
        is_due = trainer.global_step % self.every_n_steps == 0 or trainer.global_step == self.last_step
        if is_due:
            self._write(trainer, "train/")
        self._has_unwritten_step = not is_due

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation's row."""
        if not trainer.sanity_checking:
            self._write(trainer, "val/")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row of the last step where training has ended before `last_step`."""
        if self._has_unwritten_step:
            self._write(trainer, "train/")
            self._has_unwritten_step = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bring everything to disk."""
        if self._board is not None:
            self._board.flush()

    def _write(self, trainer: Trainer, prefix: str) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(prefix)}
        step = trainer.global_step
        row = {**self.labels, "step": step, "tokens": step * self.tokens_per_step, **metrics}
        for file in self._files:
            file.write(row)
        if self._board is not None:
            if not self._board.is_open:
                self._board.open(step, self._rows_of(step, but=row))
            self._board.write(step, metrics)

    def _rows_of(self, step: int, but: Row) -> list[Row]:
        """Other rows of this stage and step, which an earlier attempt has written."""
        rows = read_rows(self._files[0].path) if self._files else []
        return [row for row in rows if row["step"] == step and row.get("stage") == but.get("stage") and row != but]


class _TensorBoard:
    """An event file. Opening it takes back what earlier files have of the steps from some step on."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self.is_open = False
        self._folder = folder
        self._reporter = reporter
        self._writer: Any = None
        self._resumed_from: int | None = None

    def resume(self, step: int) -> None:
        """Training goes on from here: of later steps nothing stays."""
        self._resumed_from = step

    def open(self, step: int, again: Sequence[Row]) -> None:
        """Make the file.

        Args:
            step: The first that will be written.
            again: Rows that hold of this step, which TensorBoard can only take back with everything else of it.
        """
        self.is_open = True
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._reporter.line("TensorBoard is not installed; metrics.jsonl has the same numbers")
            return
        purged = step if self._resumed_from is None else min(step, self._resumed_from + 1)
        self._writer = SummaryWriter(str(self._folder), purge_step=purged)
        for row in again:
            self.write(step, {name: value for name, value in row.items() if name.startswith(("train/", "val/"))})

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
