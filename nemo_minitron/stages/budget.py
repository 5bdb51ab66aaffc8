"""A training's time budget as a number of steps: what the stage measured at its start, and what then fits.

The number is fixed once and kept in `budget.json`. Everything after that (the order of samples, learning rate,
validations) follows from the number alone, so that a resumed training, or one that is given the same `tokens`, ends
with the same bytes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.callbacks.reporter import duration
from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.stages.files import read_json, write_json

FILE = "budget.json"
LEAST_FRACTION = 0.25
"""Of the minutes of a run: what its trainings take even where the other stages leave them less."""


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


@dataclass(frozen=True, kw_only=True)
class Given:
    """A training's time."""

    seconds: float
    """Wall-clock time of the stage."""
    source: str
    """The keys that it comes from, as an error shows them."""
    notice: str = ""
    """What to tell the user of it before work begins."""

    @classmethod
    def of(cls, settings: TrainingConfig, minutes_left: float | None, *, key: str, trainings: int = 1) -> "Given":
        """The stage's own budget, or what the other stages leave of the run's.

        Args:
            settings: A training with `minutes`.
            minutes_left: That rest, where the budget is the run's.
            key: Of the section in the recipe.
            trainings: How many of the run share its time.
        """
        minutes = settings.minutes or 0.0
        source = f"{key}.minutes = {minutes:g}"
        if minutes_left is None:
            return cls(seconds=60 * minutes, source=source)
        others = minutes - minutes_left
        source = f"{source} for the complete run, {others:.2g} for other stages"
        seconds = 60 * taken(minutes, minutes_left, trainings)
        late = f"{source}: this machine is slow or busy; {key} takes {duration(seconds)}, and the run ends later"
        return cls(seconds=seconds, source=source, notice=late if 60 * minutes_left < seconds else "")


def taken(minutes: float, left: float, trainings: int) -> float:
    """Minutes of one of the trainings that get what other stages leave of a run: together at least a fraction of it.

    A run that has scored and pruned for minutes is worth more with a short training, late, than with none.
    """
    return max(left, LEAST_FRACTION * minutes / trainings)


def fitting(settings: TrainingConfig, costs: Costs, given: Given, *, seconds: float) -> TrainingConfig:
    """The training with as many steps as fit into what is left of its time.

    Args:
        settings: A training with `minutes`.
        costs: What its parts take here.
        given: Its time.
        seconds: What is left of it after the measurement.

    Raises:
        ConfigError: Not one step fits.
    """
    if costs.of(settings.with_steps(1)) > seconds:
        short = (costs.of(settings.with_steps(1)) - seconds) / 60
        raise ConfigError(
            "recipe",
            [
                f"{given.source}: one optimizer step takes {costs.step:.3g} s here (measured), "
                f"reading the models {costs.start:.3g} s and a validation {costs.validation:.3g} s; the least is "
                f"{(settings.minutes or 0.0) + short:.2g} minutes"
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


def keep(folder: Path, fixed: TrainingConfig, costs: Costs, given: Given) -> dict[str, Any]:
    """Write down what was fixed and why; returns it."""
    record = {
        "minutes": round(given.seconds / 60, 3),
        "steps": fixed.steps,
        "tokens": fixed.tokens,
        "seconds_expected": round(costs.of(fixed), 1),
        "measured_seconds": {name: round(value, 4) for name, value in asdict(costs).items()},
    }
    write_json(folder / FILE, record)
    return record
