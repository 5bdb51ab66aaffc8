"""Checkpoints of several ranks: written while training goes on, on slow file systems, and on disks that are full."""

import subprocess
from pathlib import Path

import pytest

from nemo_minitron.config.parallel import ParallelConfig
from tests.parallel import checkpoint_jobs as jobs
from tests.parallel.megatron_jobs import Case
from tests.ranks import RankError, run_on_ranks

TP2 = Case("tied", ParallelConfig(tensor=2))
DP2 = Case("tied", distributed=True)


@pytest.mark.parametrize("case", [TP2, DP2], ids=["tp2", "dp2"])
def test_what_is_saved_while_training_goes_on_is_the_step_that_was_asked_for(case, tmp_path):
    for found in run_on_ranks(2, jobs.save_while_training, case, tmp_path):
        assert found["during"] == (None, False), "it has no name before it is complete"
        assert found["done"]
        assert len(found["at_once"]) == 2
        assert found["meanwhile"] == found["at_once"]
        assert found["later"] != found["at_once"], "steps were made"
        assert found["left"] == ["at_once", "later", "meanwhile"]
    checked(tmp_path / "meanwhile")


def test_a_write_in_the_background_that_fails_is_everybodys_error(tmp_path):
    for text in run_on_ranks(2, jobs.fail_while_training, TP2, tmp_path):
        assert f"{tmp_path}/meanwhile could not be written" in text
        assert "No space left on device; it takes " in text
    assert not list(tmp_path.iterdir()), "nothing half is left"


def test_names_that_other_machines_see_late_are_waited_for(tmp_path):
    assert run_on_ranks(2, jobs.save_with_late_names, TP2, tmp_path, 0.5, 30.0) == ["", ""]


def test_a_folder_that_other_machines_never_see_is_told(tmp_path):
    for text in run_on_ranks(2, jobs.save_with_late_names, TP2, tmp_path, 100.0, 0.5):
        assert "another rank does not see it" in text
        assert "a disk that all machines share" in text
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs rights that this machine does not give")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(small_disk):
    for early, late, left in run_on_ranks(2, jobs.save_on_a_full_disk, TP2, small_disk, None):
        assert f"{small_disk}/second.ckpt could not be written: too little space; it takes " in early
        assert f"{small_disk}/second.ckpt could not be written" in late
        assert "No space left on device" in late
        assert "it takes " in late
        assert left == ["first.ckpt"]
    checked(small_disk / "first.ckpt")


def test_a_limit_on_file_sizes_leaves_the_checkpoint_before(tmp_path):
    for _, late, left in run_on_ranks(2, jobs.save_on_a_full_disk, TP2, tmp_path, 20_000):
        assert "second.ckpt could not be written" in late
        assert "File too large; it takes " in late
        assert left == ["first.ckpt"]
    checked(tmp_path / "first.ckpt")


def checked(folder: Path) -> None:
    """By the program of that name, which must find every file listed."""
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == len(list(folder.iterdir())) - 1


@pytest.mark.parametrize(("how", "words"), [("killed", "closed by peer"), ("silent", "imed out")])
def test_a_rank_that_is_gone_or_silent_is_recognised(how, words):
    if how == "killed":
        with pytest.raises(RankError) as caught:
            run_on_ranks(2, jobs.lose_a_rank, how)
        assert "rank 1" in str(caught.value)
        assert "rank 0" not in str(caught.value), "it found a word for it"
    else:
        assert words in run_on_ranks(2, jobs.lose_a_rank, how)[0]
