"""Threads of a process that computes on the CPU: how many there are, and how they wait for each other.

OpenMP reads both when torch is loaded, so they are set before that, and only where the user has said nothing.

Left alone, OpenMP starts a thread for each core of the machine, also in a container that may use two of them, and a
thread that waits for the others spins for milliseconds. On a machine that does other work too, it spins while the
thread that it waits for has no core to run on. Threads that sleep at once have to be woken thousands of times per step,
which costs a third of the speed of a machine that does nothing else. So they spin for a tenth of a millisecond at most
where the machine is idle when a command begins, and sleep at once where it is not.
"""

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from nemo_minitron.cores import allowed_cores

SPINS = 4000
"""GNU's OpenMP counts what it waits in rounds of a loop, of 10 to 40 nanoseconds each."""
_SPIN_MILLISECONDS = 1
"""LLVM's OpenMP (macOS) counts in milliseconds, of which this is the least."""
_SAMPLE_SECONDS = 0.1
_BUSY = 0.25
"""Cores that other programs may use up before a machine counts as busy: there is always something."""
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def choose(*, ranks: int = 1, environment: MutableMapping[str, str] | None = None) -> None:
    """Set OpenMP's environment variables that are not set yet.

    `ranks` processes share this machine's cores; an environment of None is this process's.
    """
    values = os.environ if environment is None else environment
    values.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    if {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"} & values.keys():
        return
    first = values["OMP_NUM_THREADS"].split(",")[0]  # a list has one number for each level of nesting
    threads = int(first) if first.isdecimal() else usable_cores()
    if threads > 1 and is_idle(threads=ranks * threads):
        values["GOMP_SPINCOUNT"], values["KMP_BLOCKTIME"] = str(SPINS), str(_SPIN_MILLISECONDS)
    else:
        values["OMP_WAIT_POLICY"] = "passive"


def is_idle(*, threads: int) -> bool:
    """Whether other programs leave a core to each of so many threads, by what they use now."""
    import psutil

    cores = psutil.cpu_count() or 1
    used: float = psutil.cpu_percent(interval=_SAMPLE_SECONDS) / 100 * cores
    return used <= cores - threads + _BUSY


def usable_cores() -> int:
    """How many cores this process may keep busy: those it may run on, or fewer where its control group has a quota."""
    return max(1, min([allowed_cores(), *(math.floor(quota) for quota in _quotas())]))


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
