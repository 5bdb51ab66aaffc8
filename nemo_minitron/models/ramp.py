"""Settings of the distillation objective that move in a straight line over training."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer


def at_step(settings: Mapping[str, Any], name: str, default: float, trainer: Trainer, *, training: bool) -> float:
    """A setting at this step: on the straight line to its `ramp_to` value, where validations are from the start."""
    first = settings.get(name, default)
    last = (settings.get("ramp_to") or {}).get(name)
    if last is None:
        return float(first)
    share = min(trainer.global_step / max(trainer.max_steps - 1, 1), 1.0) if training else 1.0
    return float(first + (last - first) * share)
