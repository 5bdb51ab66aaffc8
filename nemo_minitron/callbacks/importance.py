"""Importance scores from an ordinary `trainer.validate` over calibration data."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.hooks import ImportanceCollector
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.pruning.scores import Scores


class ImportanceCallback(Callback):
    """Collects the statistics that all width and depth scores follow from, while the model validates.

    Args:
        path: Where rank 0 writes the scores when validation ends; None keeps them in `scores` only.
        provenance: What the scores were made from (data and tokenizer digests); stored in the file.

    Attributes:
        scores: The result, the same on every rank; None before validation has ended.

    Scores do not depend on the layout or the micro-batch size beyond rounding (sites and statistics: `ops.importance`).
    """

    def __init__(self, path: str | Path | None = None, *, provenance: dict[str, Any] | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.provenance = dict(provenance or {})
        self.scores: Scores | None = None
        self._collector: ImportanceCollector | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: MegatronGPTModel) -> None:
        """Attach the hooks."""
        self._collector = ImportanceCollector(pl_module.chunks, pl_module.runtime, pl_module.spec)
        self._collector.__enter__()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: MegatronGPTModel, batch: MicroBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the hooks which tokens of the coming micro-batches count."""
        micro_batches = batch.split(int(pl_module.cfg.micro_batch_size))
        self._collector.expect([micro_batch.keep for micro_batch in micro_batches])

    def on_validation_end(self, trainer: Trainer, pl_module: MegatronGPTModel) -> None:
        """Gather over the layout, check that every number is finite, and write the file.

        Raises:
            ScoresError: NaN or infinity in the activations; names layer and site.
        """
        collector, self._collector = self._collector, None
        collector.__exit__(None, None, None)
        self.scores = Scores(pl_module.spec, collector.result(), provenance=self.provenance)
        if self.path is not None and trainer.is_global_zero:
            self.scores.save(self.path)
        trainer.strategy.barrier()

    def on_exception(self, trainer: Trainer, pl_module: MegatronGPTModel, exception: BaseException) -> None:
        """Take the hooks off when validation breaks."""
        if self._collector is not None:
            self._collector.__exit__(None, None, None)
            self._collector = None
