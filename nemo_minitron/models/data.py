"""Token files as Lightning loaders that know the layout and where a stopped run left off."""

from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.megatron.data import WindowDataset, loader, training_dataset


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

    def train_dataloader(self) -> DataLoader:
        """Batches of the steps that are left; its length counts all steps, as Lightning's progress does."""
        batch = self.settings.batch
        samples = self.settings.steps * batch.global_batch_size
        dataset = training_dataset(self.folder, batch.sequence_length, samples, seed=self.seed)
        return self._loader(dataset, consumed_samples=self.trainer.global_step * batch.global_batch_size)

    def val_dataloader(self) -> DataLoader:
        """Held-out windows in order, always the same ones."""
        settings = self.settings
        dataset = WindowDataset(self.folder, "heldout", settings.batch.sequence_length, settings.validation_samples)
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
