"""One candidate of a search: cut from the teacher in memory, trained for a rung, and measured. Nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.megatron.data import WindowDataset, training_dataset
from nemo_minitron.models.connector import model_of
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.distillation import MegatronGPTDistillationModel
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.stages import signals
from nemo_minitron.stages.processes import release_memory
from nemo_minitron.stages.session import make_trainer, validate


@dataclass(frozen=True, kw_only=True)
class CachedText:
    """The training samples that the teacher's targets are stored of."""

    folder: Path
    """Token files."""
    targets: Path
    samples: int
    order_seed: int
    """Of the samples in the cache."""

    def order(self, count: int, seed: int) -> Sequence[int]:
        """Which of them a training of `count` samples sees, one after the other; seed 0 takes them as they lie."""
        if seed == 0:
            return range(count)
        shuffled = np.random.default_rng(seed).permutation(self.samples)
        return [int(index) for index in shuffled[:count]]


class CandidateData(TokenDataModule):
    """Training samples that have cached targets, in an order of their own.

    Args:
        text: The samples.
        settings: Batches and steps of the training.
        order: Numbers of the samples in the cache.
    """

    def __init__(self, text: CachedText, settings: DistillConfig, order: Sequence[int]) -> None:
        super().__init__(text.folder, settings, seed=text.order_seed)
        self._text, self._order = text, order

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of all steps."""
        length = self.settings.batch.sequence_length
        stored = training_dataset(self.folder, length, self._text.samples, seed=self.seed)
        return self._loader(_Reordered(stored, self._order))


class _Reordered(Dataset[dict[str, Tensor]]):
    """Samples of another dataset by number."""

    def __init__(self, samples: Any, order: Sequence[int]) -> None:
        self._samples, self._order = samples, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._samples[None if index is None else self._order[index]]
        return found


class _TakeSignals(Callback):
    """Lightning puts its own signal handlers in place when training starts; ours go back."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.take()


def loss_of(source: TensorSource, config: RunConfig, data: Path) -> float:
    """Nats per token of a model on the search's calibration windows."""
    release_memory()
    trainer = make_trainer(config)
    settings = _settings(config, config.distill)
    model = model_of(MegatronGPTModel, source, settings=settings, trainer=trainer)
    return _measured(model, trainer, config, data)


def trained_loss_of(
    source: TensorSource, config: RunConfig, training: DistillConfig, text: CachedText, *, seed: int
) -> float:
    """The same after a short distillation from cached targets.

    Args:
        source: The pruned model.
        config: The recipe.
        training: The rung's.
        text: Samples and targets.
        seed: Order of the samples.
    """
    release_memory()
    order = text.order(training.steps * training.batch.global_batch_size, seed)
    trainer = make_trainer(
        config,
        [_TakeSignals()],
        max_steps=training.steps,
        max_epochs=-1,
        val_check_interval=training.steps + 1,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0,
    )
    model = model_of(MegatronGPTDistillationModel, source, settings=_settings(config, training), trainer=trainer)
    model.attach_cache(text.targets, order=order)
    trainer.fit(model, datamodule=CandidateData(text, training, order))
    return _measured(model, trainer, config, text.folder)


def _settings(config: RunConfig, training: DistillConfig) -> ModelSettings:
    told = ModelSettings.of_training(training, training.without_targets())
    return told.model_copy(update={"parallel": config.parallel, "precision": config.precision, "seed": config.seed})


def _measured(model: MegatronGPTModel, trainer: Trainer, config: RunConfig, data: Path) -> float:
    batch = config.distill.batch
    windows = WindowDataset(data, "calibration", batch.sequence_length, config.search.samples, spread=True)
    return float(validate(model, windows, micro_batch_size=batch.micro_batch_size, trainer=trainer)["val/ce"])
