"""Token files as Lightning loaders that know the layout and where a stopped run left off."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.config.tuning import TuneConfig
from nemo_minitron.megatron.chat_files import INFO_NAME, ConversationDataset
from nemo_minitron.megatron.data import WindowDataset, loader, training_dataset
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.token_files import read_info
from nemo_minitron.models.strategy import strategy_of

_DIGITS = 16
"""Of a digest that is shown."""


class _RankDataModule(LightningDataModule):
    """Loaders of this data-parallel rank's share of each global batch."""

    @property
    def _running(self) -> Trainer:
        assert self.trainer is not None, "a trainer asks for loaders"
        return self.trainer

    def _share(
        self, dataset: Dataset[dict[str, Tensor]], global_batch_size: int, consumed_samples: int = 0
    ) -> DataLoader[MicroBatch]:
        runtime = strategy_of(self._running).runtime
        return loader(
            dataset,
            global_batch_size=global_batch_size,
            dp_rank=runtime.dp_rank,
            dp_size=runtime.dp_size,
            consumed_samples=consumed_samples,
        )


class TokenDataModule(_RankDataModule):
    """Training batches from Megatron's GPT dataset, validation windows from the held-out split.

    Args:
        folder: What the data stage wrote.
        settings: Batch sizes, number of steps and of validation samples.
        seed: Order of the training samples, the same at every layout.

    Each item is this data-parallel rank's share of one global batch. A resumed run starts at the sample after the last
    one its checkpoint has seen, in the order that its checkpoint has: that of the number of steps with which training
    began. Of fewer steps it takes the first samples; of more steps, all samples of that order, and then those of
    another one behind it.
    """

    def __init__(self, folder: Path, settings: TrainingConfig, *, seed: int) -> None:
        super().__init__()
        self.folder = folder
        self.settings = settings
        self.seed = seed
        self._orders: list[int] = []

    def with_settings(self, settings: TrainingConfig) -> Self:
        """The same data for a training with other settings."""
        return type(self)(self.folder, settings, seed=self.seed)

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Batches of the steps that are left; its length counts all steps, as Lightning's progress does."""
        batch = self.settings.batch
        samples = max(self.settings.steps, self._running.max_steps) * batch.global_batch_size
        if self._running.global_step == 0:
            self._orders = []  # of an earlier training
        if not self._orders:
            self._orders = [samples]
        parts = [self._part(index, count) for index, count in enumerate(self._orders)]
        if (rest := samples - sum(map(len, parts))) > 0:
            parts.append(self._part(len(parts), rest))
            self._orders.append(rest)
        dataset = parts[0] if len(parts) == 1 else _OneAfterAnother(parts)
        return self._loader(dataset, consumed_samples=self._running.global_step * batch.global_batch_size)

    def _part(self, index: int, samples: int) -> Any:
        """Samples in one order; those that come behind others have an order of their own."""
        seed = self.seed if index == 0 else int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
        return training_dataset(self.folder, self.settings.batch.sequence_length, samples, seed=seed)

    def described(self) -> dict[str, Any]:
        """What the order of the samples, and what validations measure, follow from."""
        batch = self.settings.batch
        return {
            "batch.sequence_length": batch.sequence_length,
            "batch.global_batch_size": batch.global_batch_size,
            "validation_samples": self.settings.validation_samples,
            "seed": self.seed,
            **self._files(),
        }

    def _files(self) -> dict[str, Any]:
        info = read_info(self.folder)
        return {"data": info["data_digest"][:_DIGITS], "samples": "blend" if "blend" in info else "documents"}

    def state_dict(self) -> dict[str, Any]:
        """The orders of the samples go into checkpoints: for how many samples each was made."""
        return {"orders": list(self._orders)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """And come back."""
        self._orders = list(state_dict["orders"])

    def val_dataloader(self) -> DataLoader[MicroBatch]:
        """Held-out windows in order, always the same ones, at even distances."""
        length, samples = self.settings.batch.sequence_length, self.settings.validation_samples
        dataset = WindowDataset(self.folder, "heldout", length, samples, spread=True)
        return self._loader(dataset)

    def _loader(self, dataset: Dataset[dict[str, Tensor]], *, consumed_samples: int = 0) -> DataLoader[MicroBatch]:
        return self._share(dataset, self.settings.batch.global_batch_size, consumed_samples)


class _OneAfterAnother(Dataset[dict[str, Tensor]]):
    """Several datasets as one; item None is the first one's, a sample that is masked throughout."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        if index is None:
            masked: dict[str, Tensor] = self._parts[0][None]
            return masked
        number = bisect_right(self._ends, index)
        sample: dict[str, Tensor] = self._parts[number][index - (self._ends[number - 1] if number else 0)]
        return sample


class ChatDataModule(TokenDataModule):
    """Conversations: batches of the train split in an order by seed, and the validation split as it lies.

    The folder is what the chat stage wrote; `settings.pack` puts several conversations into one sample.
    """

    settings: TuneConfig

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """As in the base class."""
        batch = self.settings.batch
        samples = max(self.settings.steps, self._running.max_steps) * batch.global_batch_size
        dataset = ConversationDataset(
            self.folder,
            "train",
            pack=self.settings.pack,
            reset_attention_mask=self.settings.reset_attention_mask,
            samples=samples,
            seed=self.seed,
        )
        return self._loader(dataset, consumed_samples=self._running.global_step * batch.global_batch_size)

    def _files(self) -> dict[str, Any]:
        digest = hashlib.sha256((self.folder / INFO_NAME).read_bytes()).hexdigest()
        packed = {name: getattr(self.settings, name) for name in ("pack", "reset_attention_mask")}
        return {"data": digest[:_DIGITS], "samples": "conversations", **packed}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order of an epoch does not depend on how many there are."""
        return {}

    def val_dataloader(self) -> DataLoader[MicroBatch]:
        """Validation conversations in order, one per sample, `validation_samples` of them at most."""
        return self._loader(ConversationDataset(self.folder, "validation", most=self.settings.validation_samples))


class CalibrationDataModule(_RankDataModule):
    """Windows of the calibration split, in order, for `trainer.validate`.

    Only the first `samples` are taken; None for all. Batches are of `global_batch_size` samples over all ranks.

    Attributes:
        provenance: Digests of the texts and of the tokenizer, for `ImportanceCallback`.

    Raises:
        DataError: The folder holds no token files.
    """

    def __init__(
        self, folder: Path, *, sequence_length: int, samples: int | None = None, global_batch_size: int = 1
    ) -> None:
        super().__init__()
        self.folder = folder
        self.sequence_length = sequence_length
        self.samples = samples
        self.global_batch_size = global_batch_size
        info = read_info(folder)
        self.provenance = {"data_digest": info["data_digest"], "tokenizer_digest": info["tokenizer_digest"]}

    def val_dataloader(self) -> DataLoader[MicroBatch]:
        """This data-parallel rank's share of each batch."""
        dataset = WindowDataset(self.folder, "calibration", self.sequence_length, self.samples)
        return self._share(dataset, self.global_batch_size)
