"""Importance scores from an ordinary `trainer.validate` over calibration data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.config.sites import FfnSite
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.hooks import ImportanceCollector
from nemo_minitron.models.gpt import gpt_model
from nemo_minitron.pruning.coverage import Coverage
from nemo_minitron.pruning.partial import PartialScores
from nemo_minitron.pruning.scores import Scores


@dataclass(frozen=True, kw_only=True)
class ScoreCheckpointing:
    """How partial sums are checkpointed, so that a calibration can be resumed.

    Attributes:
        path: Where; the file is replaced each time, and left there at the end.
        every: Samples between two saves.
        samples: Samples in all, those of `resume` included.
        identity: JSON data that tells what is measured; stored in the file.
        resume: What an earlier attempt left; the loader must begin behind its `consumed` samples.
        stop_requested: Whether this rank was asked to stop; polled after each batch.
        stop: Called on every rank after a save that was asked for; must not return.
        take_signals: Called when validation starts, since Lightning puts its own signal handlers in place just before.
    """

    path: Path
    every: int
    samples: int
    identity: dict[str, Any]
    resume: PartialScores | None = None
    stop_requested: Callable[[], bool] = lambda: False
    stop: Callable[[], None] = lambda: None
    take_signals: Callable[[], Any] = lambda: None


class ImportanceCallback(Callback):
    """Collects the statistics that all width and depth scores follow from, while the model validates.

    Args:
        path: Where rank 0 writes the scores when validation ends; None keeps them in `scores` only.
        ffn_site: What MLP neurons are measured on.
        sublayers: Whether mixer and feed-forward of each layer are measured apart as well.
        provenance: What the scores were made from (data and tokenizer digests); stored in the file.
        coverage: Which calibration samples they rest on. Without it the file cannot be merged with others.
        saving: Save sums on the way, and go on from those of an earlier attempt.

    Attributes:
        scores: The result, the same on every rank; None before validation has ended.
        losses: Sums of validation over all samples, those before the resumption included: `ce`, `tokens`.

    Scores do not depend on the layout or the micro-batch size beyond rounding (sites and statistics: `ops.importance`).
    Saving does not change them either; a calibration that was cut off and resumed at one layout ends with the same
    bytes. (When a signal stops it between two regular saves, on several data-parallel ranks: but for the last digit.)
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        ffn_site: FfnSite | str = FfnSite.AFTER_ACTIVATION,
        sublayers: bool = False,
        provenance: dict[str, Any] | None = None,
        coverage: Coverage | None = None,
        saving: ScoreCheckpointing | None = None,
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.ffn_site = FfnSite(ffn_site)
        self.sublayers = sublayers
        self.provenance = dict(provenance or {})
        if coverage is not None:
            self.provenance["calibration"] = [coverage.to_dict()]
        self.saving = saving
        self.scores: Scores | None = None
        self.losses: dict[str, float] = {}
        self._consumed = 0
        self._collector: ImportanceCollector | None = None

    @property
    def _running(self) -> ImportanceCollector:
        assert self._collector is not None, "validation has started"
        return self._collector

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the hooks."""
        model = gpt_model(pl_module)
        collector = ImportanceCollector(
            model.chunks, model.runtime, model.spec, ffn_site=self.ffn_site, sublayers=self.sublayers
        )
        self.losses, self._consumed = {}, 0
        if self.saving is not None:
            self.saving.take_signals()
            if (before := self.saving.resume) is not None:
                collector.load(before.sums)
                self.losses, self._consumed = dict(before.losses), before.consumed
        self._collector = collector.__enter__()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: MicroBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the hooks which tokens of the coming micro-batches count."""
        micro_batches = gpt_model(pl_module).micro_batches(batch)
        self._running.expect([micro_batch.keep for micro_batch in micro_batches])

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save when it is time to, or when any rank was asked to stop."""
        model = gpt_model(pl_module)
        for name, value in model.validation_reports[-1].items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        if (saving := self.saving) is None:
            return
        before = self._consumed
        self._consumed = min(before + len(batch.tokens) * model.runtime.dp_size, saving.samples)
        stopping = trainer.strategy.reduce_boolean_decision(saving.stop_requested(), all=False)
        if stopping or self._consumed // saving.every > before // saving.every:
            sums = self._running.result()
            self._running.load(sums)  # a resumed run adds up in this order too
            if trainer.is_global_zero:
                PartialScores(sums, self._consumed, saving.identity, self.losses).save(saving.path)
        if stopping:
            trainer.strategy.barrier()
            saving.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather over the layout, check that every number is finite, and write the file.

        Raises:
            ScoresError: NaN or infinity in the activations; names layer and site.
        """
        collector, self._collector = self._running, None
        collector.__exit__(None, None, None)
        spec = gpt_model(pl_module).spec
        self.scores = Scores(spec, collector.result(), ffn_site=self.ffn_site, provenance=self.provenance)
        if self.path is not None and trainer.is_global_zero:
            self.scores.save(self.path)
        trainer.strategy.barrier()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off when validation breaks."""
        if self._collector is not None:
            self._collector.__exit__(None, None, None)
            self._collector = None
