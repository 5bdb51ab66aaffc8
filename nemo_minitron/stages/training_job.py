"""What a training stage hands to the training that all of them share."""

from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.callbacks.history import ValidationHistory
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.gpt import MegatronGPTModel


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What one stage trains, on what, and how it is watched."""

    kind: type[MegatronGPTModel]
    model: Path
    """Checkpoint folder to begin with."""
    settings: TrainingConfig
    distillation: DistillationConfig | None = None
    """Objective and targets; None for a model that has no teacher."""
    data: TokenDataModule
    monitor: ValidationHistory
    metric: str
    """What says how good the model is, of those that `monitor` keeps; lower is better."""
    result: str
    """Name of the folder that is written."""

    @property
    def model_settings(self) -> ModelSettings:
        """What the model is told."""
        return ModelSettings.of_training(self.settings, self.distillation)
