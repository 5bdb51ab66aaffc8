"""Checkpoints of two ranks whose disk or file system is not as it should be."""

import errno
import hashlib
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from nemo_minitron.checkpoints import digests
from nemo_minitron.config.parallel import Precision
from nemo_minitron.errors import CheckpointError
from tests.parallel.megatron_jobs import ALL_SPECS, Case, loss, micro_batches, optimizer_config


class Training:
    """A model, its optimizer, and steps."""

    def __init__(self, case: Case) -> None:
        from nemo_minitron.megatron import optim, runtime
        from nemo_minitron.megatron.build import build_chunks

        self.here = runtime.start(case.parallel, seed=0)
        self.case = case
        config = optimizer_config(case)
        self.wrapped = optim.wrap(build_chunks(ALL_SPECS[case.spec], self.here, Precision.FP32, seed=7), config)
        self.optimizer = optim.build_optimizer(self.wrapped, config, Precision.FP32, 8)

    def step(self) -> None:
        from nemo_minitron.megatron.forward import run

        self.optimizer.zero_grad()
        run(self.wrapped, micro_batches(self.case, self.here), loss, runtime=self.here, forward_only=False)
        self.optimizer.step()

    def save(self, path: Path, background: Any = None) -> None:
        from nemo_minitron.megatron.sharded_io import save_training

        save_training(self.wrapped, self.optimizer, path, common={"step": 1}, background=background)

    def load(self, path: Path) -> dict[str, Any]:
        from nemo_minitron.megatron.sharded_io import load_training

        return load_training(self.wrapped, self.optimizer, path)


def stored(folder: Path) -> dict[str, str]:
    """Digest of each file of tensors."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.distcp")}


def save_while_training(case: Case, folder: Path) -> dict[str, Any]:
    """One state saved at once, and in the background while two more steps are made before a byte is written."""
    from nemo_minitron.megatron.checkpoint_writer import BackgroundWriter

    training = Training(case)
    training.step()
    training.save(folder / "at_once")
    released = threading.Event()
    _before_writing(released.wait)
    background = BackgroundWriter()
    training.save(folder / "meanwhile", background)
    training.step()
    training.step()
    during = background.finished(wait=False), (folder / "meanwhile").exists()
    released.set()
    done = background.finished(wait=True)
    training.save(folder / "later")
    return {
        "during": during,
        "done": done == folder / "meanwhile" and background.finished(wait=True) is None,
        "left": sorted(path.name for path in folder.iterdir()),
        **{name: stored(folder / name) for name in ("at_once", "meanwhile", "later")},
    }


def fail_while_training(case: Case, folder: Path) -> str:
    """The disk of rank 1 is full when the background comes to write."""
    from nemo_minitron.megatron.checkpoint_writer import BackgroundWriter

    training = Training(case)

    def full() -> None:
        if training.here.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    _before_writing(full)
    background = BackgroundWriter()
    training.save(folder / "meanwhile", background)
    training.step()
    try:
        background.finished(wait=True)
    except CheckpointError as error:
        return str(error)
    return ""


def _before_writing(action: Any) -> None:
    write_data = dcp.FileSystemWriter.write_data

    def delayed(self, *args):
        action()
        return write_data(self, *args)

    dcp.FileSystemWriter.write_data = delayed


def save_with_late_names(case: Case, folder: Path, delay: float, patience: float) -> str:
    """Each rank sees names that the other one made only after a while; returns the error, if any."""
    training = Training(case)
    training.step()
    digests.VISIBLE_WITHIN = patience
    exists, is_file, first_asked = Path.exists, Path.is_file, {}
    foreign = f"__{1 - training.here.rank}_0.distcp"

    def late(path: Path) -> bool:
        hidden = path.name == foreign or (training.here.rank == 1 and path.name in (".state.partial", "metadata.json"))
        return hidden and time.monotonic() < first_asked.setdefault(path, time.monotonic()) + delay

    Path.exists = lambda path, **kwargs: not late(path) and exists(path, **kwargs)
    Path.is_file = lambda path, **kwargs: not late(path) and is_file(path, **kwargs)
    try:
        training.save(folder / "state")
        training.load(folder / "state")
    except CheckpointError as error:
        return str(error)
    finally:
        Path.exists, Path.is_file = exists, is_file
    assert first_asked, "something was late"
    return ""


def save_on_a_full_disk(case: Case, folder: Path, limit: int | None) -> tuple[str, str, list[str]]:
    """A first checkpoint fits, a second one does not. Returns the errors of writing it, seen early and late."""
    training = Training(case)
    training.step()
    training.save(folder / "first.ckpt")
    if limit is None and training.here.rank == 0:
        (folder / "of_others").write_bytes(b"x" * (shutil.disk_usage(folder).free - 100_000))
    elif limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    early = _error_of(lambda: training.save(folder / "second.ckpt"))
    # As if others had filled the disk after it was asked.
    disk_usage = shutil.disk_usage
    shutil.disk_usage = lambda path: disk_usage(path)._replace(free=2**40)
    late = _error_of(lambda: training.save(folder / "second.ckpt"))
    shutil.disk_usage = disk_usage
    training.load(folder / "first.ckpt")
    return early, late, sorted(path.name for path in folder.iterdir() if path.is_dir())


def _error_of(action: Any) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def lose_a_rank(how: str) -> str:
    """What `peer_error` makes of the other rank's end, or of its silence."""
    import os
    from datetime import timedelta

    from torch import distributed, ones

    from nemo_minitron.stages.processes import peer_error

    group = distributed.new_group(timeout=timedelta(seconds=2))
    if distributed.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), 9)
        time.sleep(5)
        return "silent"
    try:
        for _ in range(1000):
            distributed.all_reduce(ones(1), group=group)
    except RuntimeError as error:
        return peer_error(error)
    return ""
