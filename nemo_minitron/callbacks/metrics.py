"""Training and validation metrics to `metrics.jsonl` and TensorBoard."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.callbacks.reporter import Reporter

Row = dict[str, Any]


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


class MetricsFile:
    """Rows of JSON, one a line, appended and flushed at once.

    A run that was cut off goes on from a checkpoint that may be older than its last rows. So the first row written by a
    process removes those of its stage that it is about to write again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def write(self, row: Row) -> None:
        """Append a row; it has at least `step`."""
        if self._file is None:
            self._drop_later_than(row)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def _drop_later_than(self, first: Row) -> None:
        if not self.path.is_file():
            return
        kept = [row for row in read_rows(self.path) if not _is_repeated(row, first)]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a metrics file; a line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _is_repeated(row: Row, first: Row) -> bool:
    if row.get("stage") != first.get("stage") or row["step"] < first["step"]:
        return False
    shared = {key for key in row if "/" in key} & first.keys()
    return row["step"] > first["step"] or bool(shared)


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
