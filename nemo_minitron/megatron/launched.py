"""Who this process is among those that torchrun, srun or `--nproc` started, by the environment. Loads no torch."""

import os
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.errors import LaunchError

LISTENER = "NEMO_MINITRON_LISTENER"
"""File descriptor of the socket, bound to MASTER_PORT, that `--nproc` hands to rank 0: no other can take the port."""
_SPECIAL_STEPS = 0xFFFFFFF0
"""Step ids from here on are Slurm's own: the batch script, the interactive shell of `salloc`, the external step."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A process and those started with it."""

    rank: int = 0
    world_size: int = 1
    by: tuple[str, ...] = ()
    """The variables that say so, rank first; none for a process started alone."""

    @property
    def told(self) -> str:
        """The variables with their values, as `RANK=0 WORLD_SIZE=2`."""
        return " ".join(f"{name}={os.environ.get(name, '')}" for name in self.by)


def find() -> Launched:
    """The place that torchrun, `--nproc` or srun gave this process.

    Raises:
        LaunchError: A variable is not a number, or the rank is not below the number of ranks.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _checked("RANK", "WORLD_SIZE")
    if is_slurm_task():
        return _checked("SLURM_PROCID", _slurm_count())
    return Launched()


def is_slurm_task() -> bool:
    """Whether srun started this process as one of the tasks of a step.

    A batch script and the shell of an interactive allocation have Slurm's variables too, but no step of their own, or
    one of Slurm's special steps. The name of the job says nothing: the user chooses it. The shell of `srun --pty` is
    told by its terminal, which an ordinary task does not have.

    Raises:
        LaunchError: SLURM_STEP_ID is not a number.
    """
    if "SLURM_PROCID" not in os.environ or _slurm_count() not in os.environ or "SLURM_STEP_ID" not in os.environ:
        return False
    if "SLURM_PTY_PORT" in os.environ and os.isatty(0):
        return False
    return _number("SLURM_STEP_ID") < _SPECIAL_STEPS


def check_complete() -> None:
    """Refuse half of what a launcher sets.

    Raises:
        LaunchError: One of RANK and WORLD_SIZE is set without the other.
    """
    here = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(here) == 1:
        (missing,) = {"RANK", "WORLD_SIZE"} - set(here)
        raise LaunchError(
            f"{here[0]}={os.environ[here[0]]} is set, and {missing} is not",
            rule="whoever starts ranks sets both, as torchrun does",
            remedy=f"unset {here[0]} to run without a launcher, or set {missing} too",
        )


def allocated() -> tuple[str, int]:
    """Slurm's job and its number of tasks where this process is inside an allocation, but no task; else `("", 1)`.

    Raises:
        LaunchError: SLURM_STEP_ID is not a number.
    """
    tasks = os.environ.get("SLURM_NTASKS", "")
    if "SLURM_JOB_ID" in os.environ and tasks.isdecimal() and not is_slurm_task():
        return os.environ["SLURM_JOB_ID"], int(tasks)
    return "", 1


def visible_gpus() -> int:
    """GPUs that this machine shows to a process, by CUDA_VISIBLE_DEVICES or the device files; no driver is asked."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([name for name in shown.split(",") if name.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()])


def local_rank() -> int:
    """Rank among the processes of this machine, 0 where nobody says.

    Raises:
        LaunchError: It is not a number.
    """
    name = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "SLURM_LOCALID"
    return _number(name) if name in os.environ else 0


def _slurm_count() -> str:
    """The name of the variable that counts a step's tasks; an allocation may hold more of them than its step."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"


def _checked(rank_name: str, count_name: str) -> Launched:
    rank, count = _number(rank_name), _number(count_name)
    if rank >= count:
        raise LaunchError(
            f"{rank_name}={rank} {count_name}={count}",
            rule=f"ranks count from 0 to {count_name} - 1",
            remedy=f"start the ranks with torchrun, srun or --nproc, or unset {rank_name} and {count_name}",
        )
    return Launched(rank, count, (rank_name, count_name))


def _number(name: str) -> int:
    value = os.environ[name]
    if not (value.isascii() and value.isdecimal()):
        raise LaunchError(
            f"{name}={value!r} in the environment",
            rule="a whole number, as torchrun and srun set it",
            remedy=f"unset {name}, or start the ranks with torchrun, srun or --nproc",
        )
    return int(value)
