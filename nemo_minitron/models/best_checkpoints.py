"""NeMo's checkpoint callback on checkpoints that are folders.

`exp_manager` makes a `NeMoModelCheckpoint`. When a training goes on, that keeps of the best checkpoints only those that
are files, or folders without `.ckpt` at their end; a checkpoint of ours is a folder with it. It would forget all of
them: the next validation would count as the best, and what was best before would lie there for ever.
"""

from pathlib import Path

from lightning.pytorch.trainer.trainer import Trainer
from nemo.utils.callbacks import NeMoModelCheckpoint
from torch import Tensor


class FolderCheckpoint(NeMoModelCheckpoint):  # type: ignore[misc]
    """The same, for folders."""

    best_k_models: dict[str, Tensor]
    best_model_path: str
    kth_best_model_path: str
    best_model_score: Tensor | None
    kth_value: Tensor | None

    def _remove_invalid_entries_from_topk(self) -> None:
        """Keep what is there and complete, and take the best and the worst of it."""
        scores = {
            path: score
            for path, score in self.best_k_models.items()
            if Path(path).is_dir() and not self.is_checkpoint_unfinished(path)
        }
        order = sorted(scores, key=lambda path: float(scores[path]), reverse=self.mode == "max")
        self.best_k_models = scores
        self.best_model_path, self.kth_best_model_path = (order[0], order[-1]) if order else ("", "")
        self.best_model_score, self.kth_value = (scores[order[0]], scores[order[-1]]) if order else (None, None)


FolderCheckpoint.__qualname__ = NeMoModelCheckpoint.__qualname__  # under which Lightning keeps its state


def take_folders(trainer: Trainer) -> None:
    """Let a trainer's NeMo callbacks, however they were made, know checkpoints that are folders."""
    for callback in trainer.checkpoint_callbacks:
        if type(callback) is NeMoModelCheckpoint:
            callback.__class__ = FolderCheckpoint
