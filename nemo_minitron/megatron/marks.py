"""Parameters for Megatron: where they are made, how they are split over ranks, and how their gradients arrive."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def device_of(config: TransformerConfig) -> torch.device:
    """Where a module makes its weights."""
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


def mark(parameter: nn.Parameter, **marks: object) -> None:
    """Set attributes of a parameter that Megatron looks for, and torch does not know."""
    for name, value in marks.items():
        setattr(parameter, name, value)
