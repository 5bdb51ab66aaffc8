"""Threads of a process that computes on the CPU: how many there are, and how they wait for each other.

OpenMP reads both when torch is loaded, so they are set before that, and only where the user has said nothing.

Left alone, OpenMP starts a thread for each core of the machine, also in a container that may use two of them, and a
thread that waits for the others spins for milliseconds. On a machine that does other work too, it spins while the
thread that it waits for has no core to run on; so threads sleep while they wait.
"""

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def choose(*, ranks: int = 1, environment: MutableMapping[str, str] | None = None) -> None:
    """Set OpenMP's environment variables that are not set yet.

    Args:
        ranks: Processes that share this machine's cores.
        environment: The environment to set them in; None for this process's.
    """
    values = os.environ if environment is None else environment
    values.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    if not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & values.keys():  # they say the same in one library's terms
        values.setdefault("OMP_WAIT_POLICY", "passive")


def usable_cores() -> int:
    """How many cores this process may keep busy: those it may run on, or fewer where its control group has a quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    return max(1, min([allowed, *(math.floor(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """CPU quotas of this process's control groups and of those around them, in cores."""
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            folders = [_CGROUPS / name.lstrip("/"), *(_CGROUPS / name.lstrip("/")).parents]
            yield from (quota for folder in folders if (quota := _quota(folder / "cpu.max")) is not None)
        elif "cpu" in controllers.split(","):
            # In a container the group's own name is not seen; its files are mounted at the top.
            for folder in (_CGROUPS / "cpu" / name.lstrip("/"), _CGROUPS / "cpu"):
                if (quota := _quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")) is not None:
                    yield quota


def _quota(*files: Path) -> float | None:
    """Quota over period, from one file with both or from one each; None where there is no limit."""
    try:
        words = " ".join(file.read_text(encoding="ascii") for file in files).split()
        quota, period = float(words[0]), float(words[1])
    except (OSError, ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 else None
