"""Megatron distributed checkpoints on their way to the disk: complete or not at all, at once or while training goes on.

Files are written by torch's writer inside this process. Megatron's own forks workers from a process whose torch has
threads, and loses their errors when they die.
"""

import errno
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from nemo_minitron.checkpoints import digests
from nemo_minitron.checkpoints.files import sync, sync_folder
from nemo_minitron.checkpoints.torch_dist import write_index
from nemo_minitron.errors import CheckpointError
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.cpu import local_objects

_MARGIN = 2**20
"""Bytes a rank may write besides its tensors: indices, and the state of the loops."""
_FULL = tuple(os.strerror(code).lower() for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_TORCH_SAVE_FAILED = "inline_container"
"""In what `torch.save` raises where the system gave it no errno."""


def write(state: dict[str, Any], path: Path, *, with_digests: bool = False) -> None:
    """Save collectively under a temporary name, then take the old folder's place.

    Args:
        state: Megatron's sharded state.
        path: On a disk that all ranks see.
        with_digests: Whether to add `SHA256SUMS`.

    Raises:
        CheckpointError: It could not be written; what was there before stays.
    """
    with _ready_to_write(state, path) as partial, local_objects():
        writer = _InProcessWriter(path, runtime.patient_group(), with_digests=with_digests)
        writer.request(state, partial).execute_sync()


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread, from a copy in host memory, while training goes on.

    Megatron-Core makes the request (`dist_checkpointing.save(async_sharded_save=True)`), as for its own queue of forked
    workers: a part that any thread can do, and a part that all ranks do together when each has done that.
    All methods are collective.
    """

    def __init__(self) -> None:
        self._group: ProcessGroup | None = None
        self._job: _Job | None = None

    def begin(self, state: dict[str, Any], path: Path) -> None:
        """Copy what this rank writes, and start; a write that is under way is finished first.

        Raises:
            CheckpointError: This one cannot be begun, or the one before could not be written.
        """
        self.finished(wait=True)
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=runtime.PATIENCE)
        with _ready_to_write(state, path) as partial, local_objects():
            writer = _InProcessWriter(path, self._group, with_digests=True, from_copy=True)
            self._job = _Job(path, partial, _size(state), writer.request(state, partial))
        self._job.start()

    def finished(self, *, wait: bool) -> Path | None:
        """The checkpoint that has become complete since the last call, if one has.

        Args:
            wait: Whether to wait for the one under way.

        Raises:
            CheckpointError: It could not be written.
        """
        job = self._job
        if job is None:
            return None
        if wait:
            job.join()
        if not runtime.agree(not job.is_alive()):
            return None
        self._job = None
        with _explained(job.path, job.partial, job.size), local_objects():
            job.finish()
        return job.path


class _Job(threading.Thread):
    """The part of a request that needs no other thread's help. A daemon: a run that fails does not wait for it."""

    def __init__(self, path: Path, partial: Path, size: int, request: AsyncRequest) -> None:
        super().__init__(name=f"writes {path.name}", daemon=True)
        self.path, self.partial, self.size = path, partial, size
        self._request = request
        self._device = runtime.current().device
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread starts with the first one
            self._request.async_fn(*self._request.async_fn_args)
        except BaseException as error:  # torch's CheckpointException is no Exception
            self._error = error

    def finish(self) -> None:
        """On every rank, when all threads have ended."""
        faults = runtime.gather_objects(self._error and f"{type(self._error).__name__}: {self._error}")
        if self._error is not None:
            raise self._error
        if (fault := next(filter(None, faults), None)) is not None:
            raise OSError(f"another rank: {fault}")
        for finalize in self._request.finalize_fns:
            finalize()


class _InProcessWriter(torch_strategy.TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format through torch's own file writer.

    Args:
        path: Where the checkpoint ends up.
        group: For the exchanges between writers.
        with_digests: Whether to add `SHA256SUMS`.
        from_copy: Whether training goes on, so that a copy is to be written.
    """

    def __init__(self, path: Path, group: ProcessGroup, *, with_digests: bool, from_copy: bool = False) -> None:
        # The parent's arguments differ between versions and configure the writer that is replaced here.
        self.backend, self.version = "torch_dist", 1
        self._path, self._group = path, group
        self._with_digests, self._from_copy = with_digests, from_copy
        self._sums: dict[str, str] = {}

    def request(self, state: dict[str, Any], partial: Path) -> AsyncRequest:
        """What is to be done: the files, then Megatron's marker, then the move. Collective."""
        request = dist_checkpointing.save(state, str(partial), sharded_strategy=self, async_sharded_save=True)
        request.add_finalize_fn(lambda: runtime.on_rank_zero(lambda: self._finish(partial), doing="finishes files"))
        return request

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path, *unused: Any) -> AsyncRequest:
        """Called by Megatron with what is sharded."""
        state, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        if self._from_copy:
            _copy_to_host(state)
        plain = torch_strategy.mcore_to_pyt_state_dict(state, False)
        return AsyncRequest(self._write, (plain, Path(checkpoint_dir)), [])

    def _write(self, state: dict[str, Any], folder: Path) -> None:
        alone = dist.get_world_size() == 1
        save(
            state,
            # Copying ahead would wait for the training's stream every few megabytes.
            storage_writer=_FileWriter(folder, thread_count=1, per_thread_copy_ahead=0),
            planner=torch_strategy.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=None if alone else self._group,
            no_dist=alone,
        )
        if self._with_digests:
            self._sums = self._sums_of_all(folder)

    def _sums_of_all(self, folder: Path) -> dict[str, str]:
        """Each rank reads back what it wrote, while that is in the page cache."""
        found: dict[str, str] | str
        try:
            found = digests.sums(folder, (path.name for path in folder.glob(f"__{dist.get_rank()}_*.distcp")))
        except OSError as error:
            found = f"{type(error).__name__}: {error}"
        parts = runtime.gather_objects(found, group=self._group)
        if (fault := next((part for part in parts if isinstance(part, str)), None)) is not None:
            raise OSError(fault)
        return {name: digest for part in parts if isinstance(part, dict) for name, digest in part.items()}

    def _finish(self, partial: Path) -> None:
        """On rank 0, when all files of all ranks are there."""
        for name in self._sums:
            if not digests.await_visible(partial / name):
                raise FileNotFoundError(
                    errno.ENOENT, "another rank wrote it, rank 0 does not see it", str(partial / name)
                )
        if self._with_digests:
            rest = [path.name for path in partial.iterdir() if path.name not in self._sums]
            digests.write(partial, {**self._sums, **digests.sums(partial, rest)})
        _take_place(partial, self._path)


class _FileWriter(FileSystemWriter):
    """torch's writer, with an index that any version of Python can read."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for row in results for result in row}
        write_index(Path(self.path), metadata)


@contextmanager
def _ready_to_write(state: dict[str, Any], path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that all ranks see, on a disk with room; failures in the block are explained."""
    partial = path.with_name(f".{path.name}.partial")
    size = _size(state)
    with _explained(path, partial, size):
        runtime.on_rank_zero(lambda: _make_room(partial), doing="makes room")
        _check_space(path, size)
        if not runtime.agree(digests.await_visible(partial)):
            raise CheckpointError(
                f"{partial}: rank 0 has made this folder, and another rank does not see it",
                rule="the run folder lies on a disk that all machines share",
                remedy="name another one with --run-dir",
            )
        yield partial


def _copy_to_host(state: dict[str, list[Any]]) -> None:
    for shards in state.values():
        for shard in shards:
            if isinstance(shard, ShardedTensor):
                shard.data = shard.data.detach().to("cpu", copy=True)


def _size(state: dict[str, Any]) -> int:
    """Bytes that all ranks write. Collective."""
    own = sum(item.data.nbytes for item in nested_values(state) if _is_written_here(item))
    total = torch.tensor(own + _MARGIN, device=runtime.current().device)
    dist.all_reduce(total)
    return int(total.item())


def _is_written_here(item: Any) -> bool:
    return isinstance(item, ShardedTensor | ShardedTensorFactory) and is_main_replica(item.replica_id)


def _check_space(path: Path, size: int) -> None:
    """Make sure that the disk holds what all ranks are about to write; half a checkpoint helps nobody."""
    free = runtime.broadcast_object(_free(path))
    if free < size:
        raise _no_room(path, size, free, "too little space")


def _free(path: Path) -> int:
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def _no_room(path: Path, size: int, free: int, cause: str) -> CheckpointError:
    gib = "{:.3g} GiB".format
    return CheckpointError(
        f"{path} could not be written: {cause}; it takes {gib(size / 2**30)} and the disk has {gib(free / 2**30)}",
        rule="a checkpoint has to fit beside those that are kept; they are complete, and so is all that was finished",
        remedy="free some space (or raise the quota, or `ulimit -f`) and repeat the command: it goes on",
    )


@contextmanager
def _explained(path: Path, partial: Path, size: int) -> Iterator[None]:
    """Failures of a write as one error, and nothing left of it."""
    try:
        with errors_of(path, "could not be written"):
            yield
    except CheckpointError as error:
        if runtime.current().rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if any(words in str(error).lower() for words in _FULL):
            raise _no_room(path, size, _free(path), error.what.partition(" could not be written: ")[2]) from error
        raise


@contextmanager
def errors_of(path: Path, what: str) -> Iterator[None]:
    """Turn what Megatron and torch raise in the block into a `CheckpointError`."""
    # torch's CheckpointException is no Exception: it passes by every handler that is not made for it.
    try:
        with warnings.catch_warnings():
            # Megatron uses what torch is about to retire.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except (OSError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"{path} {what}: {_first_cause(error)}") from error
    except RuntimeError as error:
        if _TORCH_SAVE_FAILED not in str(error):
            raise
        raise CheckpointError(f"{path} {what}: {_first_cause(error)}") from error


def _first_cause(error: BaseException) -> str:
    """What the first rank that failed has to say, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (failure, _) = min(error.failures.items())
        return f"rank {rank}: {_told(failure)}"
    return _told(error)


def _told(error: BaseException) -> str:
    if _TORCH_SAVE_FAILED in str(error):
        return f"{os.strerror(errno.ENOSPC)}? {str(error).splitlines()[0]}"
    return f"{type(error).__name__}: {error}".strip()


def _make_room(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _take_place(partial: Path, path: Path) -> None:
    previous = path.with_name(f".{path.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    sync_folder(partial)
    if path.exists():
        path.rename(previous)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)
