"""A training's time budget as a number of steps: what the stage measured at its start, and what then fits.

The number is fixed once and kept in `budget.json`. Everything after that (the order of samples, learning rate,
validations) follows from the number alone, so that a resumed training, or one that is given the same `tokens`, ends
with the same bytes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.stages.files import read_json, write_json

FILE = "budget.json"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the parts of a training, as measured on this machine."""

    step: float
    """One optimizer step, at its steady speed."""
    validation: float
    """One validation."""
    checkpoint: float
    """Writing one training checkpoint."""
    start: float
    """Building the models and reading their weights."""

    def of(self, settings: TrainingConfig) -> float:
        """Seconds of a training whose steps are fixed: start, steps, validations, checkpoints, and the result."""
        steps = settings.steps
        # One before training, one at the end at the latest.
        validations = 1 + -(-steps // settings.validation_interval)
        every = settings.checkpoint_interval
        checkpoints = steps // every if every else 0
        # The result is about as large as what a checkpoint holds of the weights, a third.
        return self.start + steps * self.step + validations * self.validation + (checkpoints + 1 / 3) * self.checkpoint


def fitting(settings: TrainingConfig, costs: Costs, *, seconds: float, key: str) -> TrainingConfig:
    """The training with as many steps as fit into some seconds.

    Args:
        settings: A training with `minutes`.
        costs: What its parts take here.
        seconds: What is left of the budget.
        key: Of the section in the recipe, for the error.

    Raises:
        ConfigError: Not one step fits.
    """
    if costs.of(settings.with_steps(1)) > seconds:
        needed = (60 * (settings.minutes or 0) - seconds + costs.of(settings.with_steps(1))) / 60
        raise ConfigError(
            "recipe",
            [
                f"{key}.minutes = {settings.minutes:g}: one optimizer step takes {costs.step:.3g} s here (measured), "
                f"reading the models {costs.start:.3g} s and a validation {costs.validation:.3g} s; the least is "
                f"{needed:.2g} minutes"
            ],
        )
    low, high = 1, max(2, int(seconds / costs.step) + 2)
    while high - low > 1:
        middle = (low + high) // 2
        fits = costs.of(settings.with_steps(middle)) <= seconds
        low, high = (middle, high) if fits else (low, middle)
    return settings.with_steps(low)


def kept(folder: Path, settings: TrainingConfig) -> TrainingConfig | None:
    """The training with the steps that an earlier attempt in this folder has fixed; None if there is none."""
    path = folder / FILE
    return settings.with_steps(int(read_json(path)["steps"])) if path.is_file() else None


def keep(folder: Path, fixed: TrainingConfig, costs: Costs, *, minutes: float) -> dict[str, Any]:
    """Write down what was fixed and why; returns it."""
    record = {
        "minutes": minutes,
        "steps": fixed.steps,
        "tokens": fixed.tokens,
        "seconds_expected": round(costs.of(fixed), 1),
        "measured_seconds": {name: round(value, 4) for name, value in asdict(costs).items()},
    }
    write_json(folder / FILE, record)
    return record
