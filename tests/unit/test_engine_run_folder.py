"""The run folder: locks, foreign folders, the manifest, atomic files."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from nemo_minitron.config.load import check
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import RunFolderError
from nemo_minitron.stages import files, manifest
from nemo_minitron.stages.run_folder import RunFolder
from tests.ranks import run_on_ranks

HOLDER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from nemo_minitron.stages.run_folder import RunFolder
    run = RunFolder(Path(sys.argv[1]))
    with run.locked():
        if os.fork() == 0:  # a data-loader worker that outlives its parent must not keep the lock
            time.sleep(20)
            os._exit(0)
        print("held", flush=True)
        time.sleep(60)
    """
)


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(RunFolderError, match=rf"another run is at work here \(process {other.pid} on "),
            run.locked(),
        ):
            pass
        other.kill()  # leaves the lock file behind, as a crash does
        other.wait()
        with run.locked():
            assert (run.stages / ".lock").read_text().startswith(f'{{"pid": {os.getpid()}')
        os.killpg(other.pid, 9)


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds README\.md, but no run"):
        RunFolder(tmp_path).create()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "file").create()


def test_asking_for_an_unfinished_stage_names_its_verb(tmp_path):
    with pytest.raises(RunFolderError, match="nemo-minitron prune"):
        RunFolder(tmp_path).stage("prune")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "DONE").write_text("{")
    with pytest.raises(RunFolderError, match="DONE"):
        files.read_json(tmp_path / "DONE")


def test_the_manifest_tells_every_command(tmp_path):
    config = check(RunConfig, {"name": "x", "model": {"source": "a"}, "data": {"sources": ["b"]}}, source="test")
    manifest.begin(tmp_path, config)
    manifest.end(tmp_path, "stopped")
    manifest.begin(tmp_path, config)
    record = files.read_json(tmp_path / "manifest.json")
    assert [command["outcome"] for command in record["commands"]] == ["stopped", "running, or killed"]
    assert record["seed"] == config.seed
    assert record["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert record["versions"]["python"].startswith("3.")


def test_peak_memory_sees_an_allocation_and_can_be_reset():
    """In a fresh process: in one that has worked, a block may find room in memory that is resident already."""
    before, held, after = run_on_ranks(1, peaks)[0]
    assert held >= before + 0.29
    assert after < before + 0.25


def peaks() -> tuple[float, float, float]:
    manifest.reset_peak_memory()
    before = manifest.peak_memory_gb()
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    held = manifest.peak_memory_gb()
    del block
    manifest.reset_peak_memory()
    return before, held, manifest.peak_memory_gb()


def test_what_a_kill_has_left_is_cleared_and_nothing_else(tmp_path):
    run = RunFolder(tmp_path / "run")
    for stage in ("data", ".score.partial", ".replaced/data.1"):
        (run.stages / stage / "index").mkdir(parents=True)
    (run.stages / "data" / "DONE").write_text("{}")
    gone = [
        *(run.stages / "data" / name for name in (".tokens-a1b2/train.bin", ".chat-c3/x", "index/.building-d4/x")),
        *(run.stages / name for name in ("data/.shards/000000.npz", ".score.partial/.attempt.json.77.tmp")),
        *(run.path / name for name in (".manifest.json.12.tmp",)),
    ]
    kept = [
        *(run.stages / name for name in ("data/train.bin", "data/index/0/a.npy", ".score.partial/.shards/000000.npz")),
        *(run.stages / name for name in (".score.partial/.attempt.json", ".lock", ".replaced/data.1/.tokens-a/x")),
    ]
    for path in (*gone, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    run.clear_leftovers()
    assert not [
        path for path in gone if path.exists() or (path.parent.name.startswith(".tokens") and path.parent.exists())
    ]
    assert all(path.exists() for path in kept)
