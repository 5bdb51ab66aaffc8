"""NeMo's checkpoint callback remembers the best of checkpoints that are folders."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from nemo.utils.callbacks import NeMoModelCheckpoint

from nemo_minitron.models.best_checkpoints import FolderCheckpoint, take_folders


@pytest.fixture
def callback(tmp_path: Path) -> NeMoModelCheckpoint:
    """As `exp_manager` makes it, of a run that had three best checkpoints, one of which is gone and one unfinished."""
    made = NeMoModelCheckpoint(dirpath=tmp_path, filename="x", monitor="val_kl", mode="min", save_top_k=3)
    take_folders(Trainer(callbacks=[made], logger=False, accelerator="cpu"))
    for name in ("a", "b", "unfinished"):
        (tmp_path / f"{name}.ckpt").mkdir()
    (tmp_path / f"unfinished{NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX}").touch()
    return made


def test_what_was_best_before_a_resume_still_is(callback: NeMoModelCheckpoint, tmp_path: Path) -> None:
    scores = {"a": 0.3, "b": 0.2, "unfinished": 0.1, "gone": 0.05}
    state = callback.state_dict()
    state["best_k_models"] = {str(tmp_path / f"{name}.ckpt"): torch.tensor(score) for name, score in scores.items()}
    callback.load_state_dict(state)
    assert isinstance(callback, FolderCheckpoint)
    assert [Path(path).stem for path in callback.best_k_models] == ["a", "b"]
    assert callback.best_model_path == str(tmp_path / "b.ckpt")
    assert callback.kth_best_model_path == str(tmp_path / "a.ckpt")
    assert float(callback.best_model_score) == pytest.approx(0.2)
    callback.mode = "max"
    callback.load_state_dict(state)
    assert callback.best_model_path == str(tmp_path / "a.ckpt")
    callback.load_state_dict({**state, "best_k_models": {}})
    assert (callback.best_model_path, callback.best_model_score) == ("", None)


def test_the_callback_finds_the_state_that_it_has_kept_as_nemo_s(callback: NeMoModelCheckpoint, tmp_path: Path) -> None:
    plain = NeMoModelCheckpoint(dirpath=tmp_path, filename="x", monitor="val_kl", mode="min", save_top_k=3)
    assert callback.state_key == plain.state_key
