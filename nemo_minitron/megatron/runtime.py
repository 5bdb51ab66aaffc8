"""The processes of a run: who this one is, which groups it belongs to, and the few collectives that stages need.

A process finds its place in the environment that torchrun or Slurm gives it; without either it is the only one. Process
groups that somebody else made (Lightning, a test) are used as they are, and left in place by `stop`.
"""

import ctypes
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.errors import LayoutError, MinitronError
from nemo_minitron.megatron import cpu, launched, rendezvous, waiting

T = TypeVar("T")

STALLED = timedelta(minutes=30)
"""How long a rank waits for another inside a computation. One that is gone is noticed at once where its connection
breaks; this is for one that hangs, or whose machine is gone without a word."""
PATIENCE = timedelta(hours=6)
"""How long a rank waits for files: rank 0 may convert a large checkpoint meanwhile, a slow disk may take one."""

_NCCL_SETTINGS = {
    # A rank that waits for one that is gone stands in a kernel: nothing can be raised there. The process is ended.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # The first rank that notices tells the others, which would wait for `STALLED` otherwise.
    "TORCH_NCCL_PROPAGATE_ERROR": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Process groups this rank belongs to."""

    tp: ProcessGroup
    """Ranks that share each weight."""
    pp: ProcessGroup
    """Pipeline stages, first to last."""
    cp: ProcessGroup
    """Ranks that share each sequence."""
    dp: ProcessGroup
    """Replicas of the model that see other samples."""
    dp_cp: ProcessGroup
    """Both of the above: the ranks over which token sums and gradients are added."""
    mp: ProcessGroup
    """One copy of the model: TP and PP together."""
    ep: ProcessGroup
    """Data-parallel ranks that share the experts of each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """This process among the processes of a run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this machine."""
    device: torch.device
    parallel: ParallelConfig
    seed: int
    groups: Groups
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    dp_size: int
    ep_rank: int = 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the output layer."""
        return self.pp_rank == self.parallel.pipeline - 1

    @property
    def expert_peers(self) -> int:
        """Data-parallel ranks that share experts with this one, itself included: neighbours by `dp_rank`.

        They exchange tokens in every pass, so each of them makes as many passes as the others, of the same shapes.
        Expert-parallel groups count context-parallel ranks too (Megatron's order: TP, CP, DP, PP).
        """
        context = self.parallel.context
        return math.lcm(self.parallel.expert, context) // context


@dataclass(frozen=True, slots=True)
class _Place:
    rank: int
    world_size: int
    local_rank: int


@dataclass
class _Started:
    """What `start` left behind in this process."""

    runtime: Runtime | None = None
    owns_processes: bool = False
    store: Store | None = None
    """Through which the processes met; None where somebody else has connected them."""
    patient: ProcessGroup | None = None


_started = _Started()


def start(parallel: ParallelConfig, *, seed: int, backend: str | None = None) -> Runtime:
    """Take this process's place: rendezvous, Megatron's groups, seeds, and the CPU bridge where there is no GPU.

    Calling it again with equal arguments returns the same runtime.

    Args:
        parallel: Parallel sizes; what is left of the world size is data parallel.
        seed: Seed of all generators, equal on every rank.
        backend: Backend of `torch.distributed`; NCCL with a GPU and Gloo without, unless given.

    Raises:
        LayoutError: The sizes do not fit the number of processes, or another layout is running.
        LaunchError: The variables of the launcher contradict each other, or rank 0's port is taken.
        LostRankError: Other ranks have not come.
        MinitronError: Megatron-Core is of an unknown version.
    """
    if (running := _started.runtime) is not None:
        if (running.parallel, running.seed) != (parallel, seed):
            raise LayoutError("another parallel layout is running", remedy="call runtime.stop() before runtime.start()")
        return running
    cpu.check_version()
    place = _find_place()
    _check_sizes(parallel, place.world_size)
    cpu.install()
    device = _claim_device(place)
    if not dist.is_initialized():
        _started.store = _rendezvous(place, backend or ("nccl" if device.type == "cuda" else "gloo"))
        _started.owns_processes = True
    _make_groups(parallel)
    _seed(seed)
    _started.runtime = _describe(place, device, parallel, seed)
    return _started.runtime


def stop() -> None:
    """Give up the parallel groups, and the connections between processes if `start` made them; else does nothing."""
    if _started.runtime is None:
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _started.runtime = _started.patient = None
    if _started.owns_processes:
        dist.destroy_process_group()
        _started.owns_processes, _started.store = False, None


def shared_store() -> Store | None:
    """What `start` has met the other processes through, for `move`; None where somebody else connected them."""
    return _started.store


def move(store: Store, rank: int, world_size: int) -> Runtime:
    """Give up all groups and take another place, in the same layout: for a while the world is another one.

    Collective over the ranks of the new world. Seeds are those of `start`; whatever was built on the groups is void.

    Args:
        store: Through which the ranks of the new world meet, and no other.
        rank: This process's in the new world.
        world_size: Ranks of the new world.

    Raises:
        LayoutError: The layout does not fit that number, or somebody else made the process groups.
    """
    from megatron.core import parallel_state

    running = current()
    if not _started.owns_processes:
        raise LayoutError("process groups that somebody else made cannot be replaced")
    _check_sizes(running.parallel, world_size)
    backend = dist.get_backend()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=STALLED)
    _started.patient = None
    _make_groups(running.parallel)
    _seed(running.seed)
    place = _Place(rank, world_size, running.local_rank)
    _started.runtime = _describe(place, running.device, running.parallel, running.seed)
    return _started.runtime


def current() -> Runtime:
    """The running runtime.

    Raises:
        LayoutError: `start` was not called.
    """
    if _started.runtime is None:
        raise LayoutError("no parallel layout is running", remedy="call runtime.start() first")
    return _started.runtime


def barrier() -> None:
    """Wait for all ranks."""
    device_ids = [current().device.index] if dist.get_backend() == "nccl" else None
    dist.barrier(device_ids=device_ids)


def patient_group() -> ProcessGroup:
    """All ranks, over Gloo, for waits on files; made when every rank asks for it first."""
    if _started.patient is None:
        _started.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _started.patient


def broadcast_object(value: T | None, *, source: int = 0, patient: bool = False, doing: str = "") -> T:
    """The value that rank `source` passes in, on every rank; what other ranks pass is ignored. It travels pickled.

    Args:
        value: Anything that can be pickled.
        source: Who has it.
        patient: Whether the source may take up to `PATIENCE` to get it; those that wait then say so.
        doing: What the source does meanwhile, for that: `makes stage data`.
    """
    values: list[Any] = [value]
    if patient:
        here = current()
        with waiting.said(here.rank, here.world_size, here.local_rank, source, doing):
            dist.broadcast_object_list(values, src=source, group=patient_group())
    else:
        dist.broadcast_object_list(values, src=source, device=current().device)
    received: T = values[0]
    return received


def on_rank_zero(work: Callable[[], T], *, doing: str) -> T:
    """What rank 0 makes of `work`, or its error, on every rank: those that wait would wait for ever. Collective.

    Args:
        work: Called on rank 0 alone; what it returns travels pickled.
        doing: What the ranks that wait say of it, as `prunes`.
    """
    value: T | None = None
    failure: Exception | None = None
    if current().rank == 0:
        try:
            value = work()
        except Exception as error:
            failure = error
    told = failure
    if not isinstance(failure, MinitronError | OSError | None):  # other errors may not survive the way
        told = RuntimeError(f"rank 0: {type(failure).__name__}: {failure}")
    value, received = broadcast_object((value, told), patient=True, doing=doing)
    if received is not None:
        raise failure or received
    return cast("T", value)


def gather_objects(value: T, *, group: ProcessGroup | None = None) -> list[T]:
    """Every rank's value, by rank, on every rank. They travel pickled, over the patient group or another."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group or patient_group())
    return values


def agree(ok: bool) -> bool:
    """Whether all ranks say yes."""
    yes = torch.tensor(int(ok), device=current().device)
    dist.all_reduce(yes, op=dist.ReduceOp.MIN)
    return bool(yes.item())


def _find_place() -> _Place:
    """Rank and number of processes: from those already connected, torchrun, Slurm, or alone."""
    if dist.is_initialized():
        return _Place(dist.get_rank(), dist.get_world_size(), launched.local_rank())
    place = launched.find()
    return _Place(place.rank, place.world_size, launched.local_rank() if place.by else 0)


def _check_sizes(parallel: ParallelConfig, world_size: int) -> None:
    if world_size % parallel.ranks:
        raise LayoutError(
            f"{world_size} process(es) for {parallel.told}",
            rule=f"the number of processes is a multiple of {parallel.ranks}",
            remedy="start more processes (--nproc), or lower the sizes under parallel:",
        )
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise LayoutError(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} without a pipeline",
            rule="virtual stages need parallel.pipeline of at least 2",
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise LayoutError(
            "parallel.sequence_parallel = true without tensor parallelism", rule="parallel.tensor is above 1"
        )


def _claim_device(place: _Place) -> torch.device:
    if not torch.cuda.is_available():
        _tune_cpu()
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), place.local_rank
    if count == 1 and (launched.is_slurm_task() or "CUDA_VISIBLE_DEVICES" in os.environ):
        index = 0  # each process is shown a GPU of its own, as by `srun --gpus-per-task=1`
    if index >= count:
        raise LayoutError(
            f"local rank {place.local_rank} on a machine with {count} GPU(s)",
            rule="one process a GPU",
            remedy="start fewer processes, or show each one a GPU of its own with CUDA_VISIBLE_DEVICES",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _tune_cpu() -> None:
    """Two settings of this process without which the CPU spends its time elsewhere.

    Numbers too small for the normal range cost a hundred cycles each. And glibc hands large freed blocks back to the
    system, which then clears every page of the next tensor: products with a vocabulary took twice as long.
    """
    torch.set_flush_denormal(True)
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # not glibc
    mmap_threshold, trim_threshold = -3, -1
    set_option(mmap_threshold, 2**30)
    set_option(trim_threshold, 2**31 - 1)


def _rendezvous(place: _Place, backend: str) -> Store | None:
    """Connect the processes; returns the store that they met through, None for one alone."""
    if backend == "nccl":
        for name, value in _NCCL_SETTINGS.items():
            os.environ.setdefault(name, value)
    if place.world_size == 1:
        # Nobody to meet: a store inside the process needs neither a port nor a file.
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=STALLED)
        return None
    if launched.is_slurm_task():
        _set_slurm_address()
    store = rendezvous.meet(place.rank, place.world_size, timeout=STALLED)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=STALLED)
    return store


def _set_slurm_address() -> None:
    """Where rank 0 listens, for tasks of srun that no batch file has told."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes:
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host(nodes))
    job = os.environ.get("SLURM_JOB_ID", "")
    if job.isdecimal():
        os.environ.setdefault("MASTER_PORT", str(15000 + int(job) % 20000))


def _first_slurm_host(nodes: str) -> str:
    """The first host of a Slurm list: `a[003-007,9],b1` gives `a003`."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]


def _make_groups(parallel: ParallelConfig) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(STALLED.total_seconds() / 60),
    )


def _seed(seed: int) -> None:
    """Seed every generator; Megatron's tracker keeps one state that differs between tensor-parallel ranks."""
    import numpy as np
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below us draw from the global generator
    torch.manual_seed(seed)


def _describe(place: _Place, device: torch.device, parallel: ParallelConfig, seed: int) -> Runtime:
    from megatron.core import parallel_state as state

    groups = Groups(
        tp=state.get_tensor_model_parallel_group(),
        pp=state.get_pipeline_model_parallel_group(),
        cp=state.get_context_parallel_group(),
        dp=state.get_data_parallel_group(),
        dp_cp=state.get_data_parallel_group(with_context_parallel=True),
        mp=state.get_model_parallel_group(),
        ep=state.get_expert_model_parallel_group(),
    )
    return Runtime(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        device=device,
        parallel=parallel,
        seed=seed,
        groups=groups,
        tp_rank=groups.tp.rank(),
        pp_rank=groups.pp.rank(),
        cp_rank=groups.cp.rank(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        ep_rank=groups.ep.rank(),
    )
