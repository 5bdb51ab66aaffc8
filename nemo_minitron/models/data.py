"""Token files as Lightning loaders that know the layout and where a stopped run left off."""

from pathlib import Path
from typing import Self

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.config.tuning import TuneConfig
from nemo_minitron.megatron.chat_files import ConversationDataset
from nemo_minitron.megatron.data import WindowDataset, loader, training_dataset
from nemo_minitron.megatron.token_files import read_info


class TokenDataModule(LightningDataModule):
    """Training batches from Megatron's GPT dataset, validation windows from the held-out split.

    Args:
        folder: What the data stage wrote.
        settings: Batch sizes, number of steps and of validation samples.
        seed: Order of the training samples, the same at every layout.

    Each item is this data-parallel rank's share of one global batch. A resumed run starts at the sample after the last
    one its checkpoint has seen.
    """

    def __init__(self, folder: Path, settings: TrainingConfig, *, seed: int) -> None:
        super().__init__()
        self.folder = folder
        self.settings = settings
        self.seed = seed

    def with_settings(self, settings: TrainingConfig) -> Self:
        """The same data for a training with other settings."""
        return type(self)(self.folder, settings, seed=self.seed)

    def train_dataloader(self) -> DataLoader:
        """Batches of the steps that are left; its length counts all steps, as Lightning's progress does."""
        batch = self.settings.batch
        samples = self.settings.steps * batch.global_batch_size
        dataset = training_dataset(self.folder, batch.sequence_length, samples, seed=self.seed)
        return self._loader(dataset, consumed_samples=self.trainer.global_step * batch.global_batch_size)

    def val_dataloader(self) -> DataLoader:
        """Held-out windows in order, always the same ones, at even distances."""
        length, samples = self.settings.batch.sequence_length, self.settings.validation_samples
        dataset = WindowDataset(self.folder, "heldout", length, samples, spread=True)
        return self._loader(dataset)

    def _loader(self, dataset: object, *, consumed_samples: int = 0) -> DataLoader:
        runtime = self.trainer.strategy.runtime
        return loader(
            dataset,
            global_batch_size=self.settings.batch.global_batch_size,
            dp_rank=runtime.dp_rank,
            dp_size=runtime.dp_size,
            consumed_samples=consumed_samples,
        )


class ChatDataModule(TokenDataModule):
    """Conversations: batches of the train split in an order by seed, and the validation split as it lies.

    Args:
        folder: What the chat stage wrote.
        settings: As in the base class; `pack` puts several conversations into one sample.
        seed: Order of the conversations, the same at every layout.
    """

    settings: TuneConfig

    def train_dataloader(self) -> DataLoader:
        """As in the base class."""
        batch = self.settings.batch
        samples = self.settings.steps * batch.global_batch_size
        dataset = ConversationDataset(
            self.folder,
            "train",
            pack=self.settings.pack,
            reset_attention_mask=self.settings.reset_attention_mask,
            samples=samples,
            seed=self.seed,
        )
        return self._loader(dataset, consumed_samples=self.trainer.global_step * batch.global_batch_size)

    def val_dataloader(self) -> DataLoader:
        """Validation conversations in order, one a sample, `validation_samples` of them at most."""
        return self._loader(ConversationDataset(self.folder, "validation", most=self.settings.validation_samples))


class CalibrationDataModule(LightningDataModule):
    """Windows of the calibration split, in order, for `trainer.validate`.

    Args:
        folder: What the data stage wrote.
        sequence_length: Tokens of a sample.
        samples: Take only the first ones; None for all.
        global_batch_size: Samples of one batch over all data-parallel ranks.

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

    def val_dataloader(self) -> DataLoader:
        """This data-parallel rank's share of each batch."""
        runtime = self.trainer.strategy.runtime
        return loader(
            WindowDataset(self.folder, "calibration", self.sequence_length, self.samples),
            global_batch_size=self.global_batch_size,
            dp_rank=runtime.dp_rank,
            dp_size=runtime.dp_size,
        )
