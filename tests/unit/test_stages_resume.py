"""Which checkpoint a run goes on from when some are damaged."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_minitron.callbacks.history import BestModel
from nemo_minitron.checkpoints import digests
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.megatron import runtime
from nemo_minitron.stages.resume import newest_complete
from nemo_minitron.stages.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(digests, "VISIBLE_WITHIN", 0.0)
    runtime.start(ParallelConfig(), seed=0)
    yield
    runtime.stop()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three checkpoints; the digests are those of `sha256sum` (RFC 6234's of "abc" among them)."""
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    for step in (2, 4, 6):
        path = tmp_path / f"{step:08d}.ckpt"
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"abc")
        (path / ".metadata").write_bytes(b"abc")
        (path / "SHA256SUMS").write_text(f"{of_abc}  .metadata\n{of_abc}  __0_0.distcp\n")
    return tmp_path


def test_the_newest_complete_one_is_taken(folder):
    told = []
    assert newest_complete(folder, warn=told.append) == folder / "00000006.ckpt"
    assert told == []


DAMAGE = {
    "a changed byte": (lambda path: (path / "__0_0.distcp").write_bytes(b"abd"), "not what was written"),
    "a lost end": (lambda path: (path / "__0_0.distcp").write_bytes(b""), "not what was written"),
    "a lost file": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp"),
    "no digests": (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    "half the digests' line": (lambda path: (path / "SHA256SUMS").write_text("ba78"), "SHA256SUMS is damaged"),
    "empty digests": (lambda path: (path / "SHA256SUMS").write_text(""), "SHA256SUMS is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_set_aside_with_a_warning(folder, damage):
    harm, words = DAMAGE[damage]
    harm(folder / "00000006.ckpt")
    told = []
    assert newest_complete(folder, warn=told.append) == folder / "00000004.ckpt"
    (text,) = told
    assert f"warning: {folder}/00000006.ckpt is damaged" in text
    assert words in text
    assert "going on from the one before" in text
    assert (folder / "00000006.damaged").is_dir(), "nothing is deleted"


def test_with_none_left_training_starts_from_the_beginning(folder):
    for path in folder.iterdir():
        (path / ".metadata").write_bytes(b"")
    told = []
    assert newest_complete(folder, warn=told.append) is None
    assert len(told) == 4
    assert told[-1] == "warning: no complete checkpoint is left: training starts from the beginning"


def test_without_checkpoints_nothing_is_said(tmp_path):
    told = []
    assert newest_complete(tmp_path / "none", warn=told.append) is None
    assert told == []


def test_our_digests_are_those_of_sha256sum(folder):
    path = folder / "00000006.ckpt"
    written = (path / "SHA256SUMS").read_text()
    digests.write(path, digests.sums(path, ["__0_0.distcp", ".metadata"]))
    assert (path / "SHA256SUMS").read_text() == written


def test_messages_name_what_was_finished_last(folder, tmp_path):
    run = RunFolder(tmp_path / "run")
    assert "no training checkpoint" in run.where_to_go_on()
    checkpoints = run.partial("distill") / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "00000004.ckpt").rename(checkpoints / "00000004.ckpt")
    assert f"{checkpoints}/00000004.ckpt (step 4)" in run.where_to_go_on()


@pytest.mark.parametrize(
    ("checkpoints", "best", "left"),
    [
        # A checkpoint of step 6 was saved before step 6 was validated: it knows the best of step 4.
        ([6], 6, [4, 6]),
        ([7], 6, [6]),
        ([4, 9], 8, [2, 8]),
        ([], 6, [6]),
    ],
)
def test_the_best_models_that_a_checkpoint_knows_stay(tmp_path, checkpoints, best, left):
    for step in (2, 4, 6, 8):
        if step <= best:
            (tmp_path / f"best-{step:08d}").mkdir()
    callback = BestModel("val/kl", folder=tmp_path)
    callback.step = best
    callback.drop_others(checkpoints)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == left
