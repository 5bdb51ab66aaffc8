"""`manifest.json`: by which code, machine and commands a run came to be. Also peak memory and the clock.

Looks at packages without importing them and at GPUs without starting CUDA.
"""

import platform
import resource
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from nemo_minitron.config.run import RunConfig
from nemo_minitron.cores import allowed_cores
from nemo_minitron.processor import processor_name
from nemo_minitron.stages.files import read_json, write_json
from nemo_minitron.version import __version__

PACKAGES = (
    "torch",
    "megatron-core",
    "nemo-toolkit",
    "lightning",
    "transformer-engine",
    "apex",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder; empty before its first command."""
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}


def begin(folder: Path, config: RunConfig, *, precision: dict[str, Any] | None = None) -> None:
    """Add a command to the manifest, with the state of code and machine it starts in.

    Args:
        folder: The run folder.
        config: The recipe.
        precision: How the run's precision was settled; None if nothing was to be settled.
    """
    before = read(folder)
    commands = before.get("commands", [])
    commands.append(
        {
            "command": shlex.join([*_program(sys.argv[0]), *sys.argv[1:]]),
            "start": now(),
            "end": None,
            "outcome": "running, or killed",
        }
    )
    record = {
        "name": config.name,
        "seed": config.seed,
        "version": __version__,
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware(),
        "precision": precision or before.get("precision"),
        "commands": commands,
    }
    write_json(folder / "manifest.json", record)


def _program(path: str) -> list[str]:
    """What was typed to start this: a script's name, or the module that `python -m` was given."""
    name = Path(path).name
    return ["python", "-m", Path(path).parent.name] if name == "__main__.py" else [name]


def end(folder: Path, outcome: str) -> None:
    """Note how the newest command ended."""
    record = read(folder)
    record["commands"][-1].update(end=now(), outcome=outcome)
    write_json(folder / "manifest.json", record)


def now() -> str:
    """The time in ISO form, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Installed versions of what results depend on; what is absent is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory and GPUs."""
    return {
        "processor": processor_name(),
        "cores": allowed_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpu_names(),
    }


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs the driver shows; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return asked.stdout.strip().splitlines() if asked.returncode == 0 else []


@lru_cache
def gpu_memory() -> list[float]:
    """Memory of each NVIDIA GPU the driver shows, in bytes; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    if asked.returncode:
        return []
    return [float(line) * 2**20 for line in asked.stdout.split() if line.strip().isdigit()]


def git_state() -> str | None:
    """Commit of the source tree the package runs from, with `-dirty` if changed; None when it is not a git checkout."""
    package = Path(__file__).resolve().parent.parent
    if shutil.which("git") is None:
        return None
    tracked = _git(package, "ls-files", "--error-unmatch", "version.py")
    commit = _git(package, "rev-parse", "HEAD") if tracked is not None else None
    if commit is None:
        return None
    return commit + ("-dirty" if _git(package, "status", "--porcelain", "--untracked-files=no", ".") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    asked = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=20
    )
    return asked.stdout.strip() if asked.returncode == 0 else None


def reset_peak_memory() -> None:
    """Start counting the peak of resident memory anew, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_gb() -> float:
    """Peak resident memory of this process in 10^9 bytes since `reset_peak_memory`, or since its start."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kibibytes * 1024 / 1e9, 3)
