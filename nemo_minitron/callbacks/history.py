"""What validations measured over training, and what follows from it: the best weights, and when to end."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes import ModelPT


class ValidationHistory(Callback):
    """Keeps what each validation measured; it goes into checkpoints.

    Attributes:
        history: One row a measurement: `step`, `source` (`val`), and the values.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.history: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a validation measured."""
        if not trainer.sanity_checking:
            self.keep(trainer, "val")

    def state_dict(self) -> dict[str, Any]:
        """The history goes into checkpoints."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """And comes back."""
        self.history = list(state_dict["history"])

    def keep(self, trainer: Trainer, source: str) -> None:
        """Add a row from the trainer's metrics of one source (`train` or `val`)."""
        metrics = trainer.callback_metrics
        values = {name: metrics[f"{source}/{name}"].item() for name in self.names if f"{source}/{name}" in metrics}
        self.history.append({"step": trainer.global_step, "source": source, **values})


class BestModel(Callback):
    """Follows one validation metric: keeps the model that did best, and ends training when it gets no better.

    Validations before training (step 0) do not count. All ranks see the same values, so all decide alike.

    Args:
        metric: As logged, such as `val/kl`; lower is better.
        folder: Where `best-STEP` folders are written (models, as `save_to` writes them); None to keep none.
        patience: Validations in a row without a better value after which training ends; 0 for never.

    Attributes:
        step: Step of the best validation so far; None before the first.
        value: Its value.
        ended: Whether patience has run out.
    """

    def __init__(self, metric: str, *, folder: Path | None, patience: int = 0) -> None:
        self.metric = metric
        self.folder = folder
        self.patience = patience
        self.step: int | None = None
        self.value: float | None = None
        self.ended = False
        self._without = 0

    @property
    def path(self) -> Path | None:
        """Where the best model lies; None when none is kept."""
        return None if self.folder is None or self.step is None else self.folder / f"best-{self.step:08d}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run that had already ended does no more steps; models of steps it will do again go."""
        if self.ended:
            trainer.should_stop = True
        if trainer.is_global_zero:
            for step, path in self._kept().items():
                if self.step is None or step > self.step:
                    shutil.rmtree(path, ignore_errors=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare; every rank calls it."""
        if trainer.sanity_checking or trainer.global_step in (0, self.step):
            return
        value = float(trainer.callback_metrics[self.metric])
        if self.value is None or value < self.value:
            self.step, self.value, self._without = trainer.global_step, value, 0
            if self.path is not None:
                assert isinstance(pl_module, ModelPT), "NeMo's models can be saved"
                pl_module.save_to(self.path)
            return
        self._without += 1
        if self.patience and self._without >= self.patience:
            self.ended = trainer.should_stop = True

    def drop_others(self, checkpoints: Sequence[int]) -> None:
        """Remove models that neither this run nor one that goes on from a checkpoint can end with. On one rank.

        A checkpoint was saved before the validation of its step.
        """
        kept = self._kept()
        needed = {self.step, *(max((step for step in kept if step < saved), default=None) for saved in checkpoints)}
        for step in kept.keys() - needed:
            shutil.rmtree(kept[step], ignore_errors=True)

    def _kept(self) -> dict[int, Path]:
        """Models by step."""
        found = self.folder.glob("best-*") if self.folder is not None else ()
        return {int(path.name.removeprefix("best-")): path for path in found}

    def state_dict(self) -> dict[str, Any]:
        """All that decides goes into checkpoints."""
        return {"step": self.step, "value": self.value, "without": self._without, "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """And comes back."""
        self.step, self.value = state_dict["step"], state_dict["value"]
        self._without, self.ended = state_dict["without"], state_dict["ended"]
