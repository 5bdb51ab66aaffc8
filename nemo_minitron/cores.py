"""How many cores this process may run on."""

import os


def allowed_cores() -> int:
    """Cores of its affinity mask; where there is none, as on macOS, those of the machine."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
