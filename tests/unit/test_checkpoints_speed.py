"""What makes large checkpoints fast must change no byte: recycled memory, reading ahead, passing by the page cache."""

import errno
import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.checkpoints import large_files, read_ahead
from nemo_minitron.checkpoints.files import staged_file, staged_folder
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.nemo1 import open_nemo, pack_nemo, write_folder
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.ops import memory
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan
from tests import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny.write_llama(folder, tied=False)
    return folder


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_files, "LARGE", 0)
    monkeypatch.setattr(large_files, "_STEP", 4096)
    monkeypatch.setattr(memory, "_SMALLEST", 0)


def written(teacher: Path, out: Path) -> dict[str, str]:
    """Digests of everything that is written from a teacher, converted both ways and pruned."""
    source = open_hf(teacher)
    target = TargetConfig(hidden_size=40, ffn_hidden_size=56, num_attention_heads=4, num_layers=3, drop_layers=(1,))
    plan = random_plan(target, source.spec, seed=3)
    write_folder(source, out / "folder")
    pack_nemo(out / "folder", out / "packed.nemo")
    packed = open_nemo(out / "packed.nemo")
    write_hf(packed, out / "back")
    write_hf(PrunedSource(packed, plan), out / "pruned", shard_bytes=40_000)
    write_folder(PrunedSource(source, plan), out / "pruned_folder", dtype=torch.bfloat16)
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_large_and_small_files_get_the_same_bytes(
    teacher: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = written(teacher, tmp_path / "plain")
    request.getfixturevalue("everything_is_large")
    assert written(teacher, tmp_path / "large") == plain
    assert (tmp_path / "large/back/model.safetensors").read_bytes() == (teacher / "model.safetensors").read_bytes()

    def refuse(handle: int, buffers: Any, position: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "flags are not supported")
        return real(handle, buffers, position)

    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", refuse)
    assert written(teacher, tmp_path / "refused") == plain


def test_a_full_disk_is_not_taken_for_a_system_without_uncached_writes(
    everything_is_large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space"), large_files.open_binary(tmp_path / "x", "wb", nbytes=9) as file:
        file.write(b"123456789")


def test_large_files_can_be_written_and_read_at_any_place(everything_is_large: None, tmp_path: Path) -> None:
    data = bytes(range(256)) * 100
    with large_files.open_binary(tmp_path / "x", "wb", nbytes=len(data)) as file:
        file.truncate(len(data))
        for start in (20_000, 5_000, 0):
            file.seek(start)
            file.write(data[start : {0: 5_000, 5_000: 20_000}.get(start)])
    assert (tmp_path / "x").read_bytes() == data
    with large_files.open_binary(tmp_path / "x", "rb", nbytes=len(data)) as file:
        file.seek(4_000)
        assert file.read(9_000) == data[4_000:13_000]
        assert file.read() == data[13_000:]


def test_memory_is_used_again_only_when_nobody_has_it() -> None:
    shape = (1 << 20,)
    with memory.recycled_memory():
        first = memory.empty(shape, torch.bfloat16)
        view = first.fill_(1).view(1024, 1024)[3]
        place = first.data_ptr()
        del first
        second = memory.empty(shape, torch.bfloat16).fill_(2)
        assert second.data_ptr() != place
        assert second.untyped_storage().nbytes() == second.nbytes  # torch.save writes complete storages
        assert torch.all(view == 1)
        del view
        third = memory.empty((1 << 19, 1), torch.float32)
        assert third.data_ptr() == place
    assert torch.all(second == 2)
    assert memory.empty((2, 3), torch.float16).shape == (2, 3)


def test_recycled_memory_is_no_more_than_what_was_needed_at_once() -> None:
    pool = memory._Pool()
    for megabytes in (300, 2, 2, 40, 5, 40):
        pool.take(megabytes << 20)
    assert [len(block) >> 20 for block in pool._blocks] == [40]


def test_reading_ahead_keeps_the_order_and_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MOST_BYTES", 30)
    lock, begun, taken, ahead = threading.Lock(), [], [], []

    def get(name: str) -> torch.Tensor:
        with lock:
            begun.append(name)
            ahead.append(sum(int(name) for name in begun) - sum(int(name) for name in taken))
        time.sleep(0.002 * (int(name) % 3))
        return torch.tensor([int(name)])

    names = [str(size) for size in (3, 9, 10, 5, 5, 29, 25, 40, 1, 2, 3, 4, 5, 6)]
    last = "0"
    for tensor in read_ahead.read_ahead(names, get, int):
        with lock:
            taken.append(last)  # the caller is done with the one before
        last = str(int(tensor))
    assert [*taken[1:], last] == names
    assert sorted(begun) == sorted(names)
    assert max(ahead) <= 40 + 25  # two that are each larger than the bound allows, otherwise at most 30


def test_an_error_comes_in_its_turn_and_stops_the_rest() -> None:
    begun = []

    def get(name: str) -> torch.Tensor:
        begun.append(name)
        if name == "2":
            raise OSError("unreadable")
        return torch.tensor([int(name)])

    tensors = read_ahead.read_ahead([str(index) for index in range(100)], get, lambda _: 1)
    assert [int(next(tensors)), int(next(tensors))] == [0, 1]
    with pytest.raises(OSError, match="unreadable"):
        next(tensors)
    assert len(begun) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_two_processes_that_write_one_target_do_not_disturb_each_other(tmp_path: Path) -> None:
    """A lock belongs to whoever opened it, so that two writers in one process stand for two processes."""
    folder, file = tmp_path / "folder", tmp_path / "file"
    with staged_folder(folder) as first, staged_file(file) as first_file:
        (first / "first").write_bytes(b"1")
        first_file.write_bytes(b"1")
        with staged_folder(folder) as second, staged_file(file) as second_file:
            (second / "second").write_bytes(b"2")
            second_file.write_bytes(b"2")
        assert [path.name for path in folder.iterdir()] == ["second"]
        assert file.read_bytes() == b"2"
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert file.read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_killed_processes_left_goes_with_the_next_write(tmp_path: Path) -> None:
    for name in (".target.partial", ".target.2.partial", ".target.2.old"):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "file").write_bytes(b"x")
    for name in (".target.lock", ".target.2.lock", ".other.partial", ".other.2.partial"):
        (tmp_path / name).write_bytes(b"")
    with staged_folder(tmp_path / "target") as partial:
        assert list(partial.iterdir()) == []
        assert [path.name for path in (tmp_path / "target").iterdir()] == ["below"], "the old one is back meanwhile"
    with staged_file(tmp_path / "other") as partial:
        partial.write_bytes(b"y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]
    assert list((tmp_path / "target").iterdir()) == []


def test_a_folder_that_another_process_has_put_there_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real, meddled = tmp_path / "target", Path.rename, []

    def rename(path: Path, to: Path) -> Path:
        found = real(path, to)
        if path == target and not meddled:
            meddled.append(path)
            (target / "theirs").mkdir(parents=True)
        return found

    (target / "old").mkdir(parents=True)
    monkeypatch.setattr(Path, "rename", rename)
    with staged_folder(target) as partial:
        (partial / "ours").mkdir()
    assert meddled
    assert [path.name for path in target.iterdir()] == ["ours"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_content_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    real = os.fsync

    def note(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", note)
    with staged_folder(tmp_path / "folder") as partial:
        (partial / "below").mkdir()
        (partial / "below" / "file").write_bytes(b"x")
    staged = str(tmp_path / ".folder.partial")
    assert synced == {f"{staged}/below/file", f"{staged}/below", staged, str(tmp_path)}
    synced.clear()
    with staged_file(tmp_path / "file") as partial:
        partial.write_bytes(b"x")
    assert synced == {str(tmp_path / ".file.partial"), str(tmp_path)}
