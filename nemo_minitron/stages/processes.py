"""The processes of one run as the engine sees them: rank 0 decides and does the file work, the others follow.

One process alone needs none of torch, so `join` loads it only where there are several.
"""

from typing import TYPE_CHECKING, Protocol, TypeVar

from nemo_minitron.megatron import launched

if TYPE_CHECKING:  # no pydantic before a command needs a recipe
    from nemo_minitron.config.parallel import ParallelConfig

T = TypeVar("T")
LAUNCHED = "NEMO_MINITRON_LAUNCHED"
"""Set in the environment of ranks that `--nproc` has started."""
_ECHO = "rank 0 has told the user"
_LOST_WORDS = (
    "closed by peer",
    "reset by peer",
    "connection refused",
    "broken pipe",
    "connection was likely closed",
    "timed out waiting",
    "connectfullmesh failed",
    "watchdog",
    "remote process exited",
)
"""What Gloo, NCCL and torch's store say when a process at the other end is gone or silent."""


def mark_reported(error: BaseException) -> BaseException:
    """Mark an error that rank 0 shows, so that the other ranks end with it in silence."""
    error.add_note(_ECHO)
    return error


def is_reported(error: BaseException) -> bool:
    """Whether rank 0 shows this error."""
    return _ECHO in getattr(error, "__notes__", ())


def peer_error(error: BaseException) -> str:
    """What the network says if an error means that another rank is gone or silent; empty if it means something else."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, (RuntimeError, OSError)) and any(word in text.lower() for word in _LOST_WORDS):
            return text.splitlines()[0]
        seen = seen.__cause__ or seen.__context__
    return ""


class Processes(Protocol):
    """What the engine asks of the processes of a run. Every method is collective."""

    rank: int
    size: int

    def broadcast(self, value: T, *, doing: str = "") -> T:
        """The value of rank 0, on every rank; those that wait say what it is `doing`."""

    def collect(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""

    def agree(self, ok: bool) -> bool:
        """Whether all ranks said yes."""


class SingleProcess:
    """A run of one process."""

    rank = 0
    size = 1

    def broadcast(self, value: T, *, doing: str = "") -> T:
        """The value itself."""
        return value

    def collect(self, value: T) -> list[T]:
        """The value itself."""
        return [value]

    def agree(self, ok: bool) -> bool:
        """One's own opinion."""
        return ok


class DistributedProcesses:
    """Several processes, met through `nemo_minitron.megatron.runtime`."""

    def __init__(self, parallel: "ParallelConfig", seed: int) -> None:
        from nemo_minitron.megatron import runtime

        self._runtime = runtime
        started = runtime.start(parallel, seed=seed)
        self.rank = started.rank
        self.size = started.world_size

    def broadcast(self, value: T, *, doing: str = "") -> T:
        """The value of rank 0, on every rank; rank 0 may work for hours before it has one."""
        received: T = self._runtime.broadcast_object(value, patient=True, doing=doing)
        return received

    def collect(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        return list(self._runtime.gather_objects(value))

    def agree(self, ok: bool) -> bool:
        """Whether all ranks said yes."""
        return bool(self._runtime.agree(ok))


def start_collectives(parallel: "ParallelConfig", *, seed: int) -> None:
    """Before a stage that all ranks run: groups, seeds and the CPU bridge, for one process too. Idempotent."""
    from nemo_minitron.megatron import runtime

    runtime.start(parallel, seed=seed)


def release_memory() -> None:
    """Free what the models of a stage leave behind.

    A model, its trainer and Megatron's gradient buffers refer to each other in cycles, which only the garbage collector
    frees; until it happens to run, the next stage's model has to fit beside them.
    """
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def environment_rank() -> tuple[int, int]:
    """Rank and world size that torchrun or srun gave this process; `(0, 1)` when started alone.

    Raises:
        LaunchError: They are not numbers, or do not fit each other.
    """
    place = launched.find()
    return place.rank, place.world_size


def join(parallel: "ParallelConfig", *, seed: int) -> Processes:
    """Meet the other processes of this run, if there are any.

    Raises:
        LayoutError: The parallel sizes do not fit the number of processes.
    """
    return DistributedProcesses(parallel, seed) if environment_rank()[1] > 1 else SingleProcess()
