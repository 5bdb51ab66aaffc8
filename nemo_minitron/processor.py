"""The processor's name."""

import platform
from pathlib import Path


def processor_name() -> str:
    """The model name that Linux gives, or what Python knows of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
