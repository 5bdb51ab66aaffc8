"""What a training stage hands to the training that all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.callbacks.history import ValidationHistory
from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.gpt import MegatronGPTModel


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What one stage trains, on what, and how it is watched."""

    kind: type[MegatronGPTModel]
    model: Path
    """Checkpoint folder to begin with."""
    keys: Mapping[str, Any]
    """Settings as keys of a NeMo model configuration; `nemo_settings.base_keys` are there already."""
    settings: TrainingConfig
    data: TokenDataModule
    monitor: ValidationHistory
    metric: str
    """What says how good the model is, of those that `monitor` keeps; lower is better."""
    result: str
    """Name of the folder that is written."""
