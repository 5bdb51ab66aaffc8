"""What checks measure with: a device, clocks that wait for it, its memory and its kernels."""

import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "apex",
    "nemo-toolkit",
    "lightning",
    "nvidia-modelopt",
    "liger-kernel",
    "transformers",
    "numpy",
)


LISTED = 30
"""Kernels whose times are told."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a call started on the device.

    Attributes:
        launches: Kernels, copies and fills; on a CPU, operators.
        busy_ms: Milliseconds in which one ran.
        names: Of the kernels, each once.
        times: Of the kernels that take longest, together: name (shortened), launches, milliseconds; longest first.
    """

    launches: int
    busy_ms: float
    names: tuple[str, ...]
    times: tuple[tuple[str, int, float], ...]


class Bench:
    """A device to measure on.

    Args:
        tiny: Use the CPU in fp32, and sizes that say nothing about speed.

    Attributes:
        tiny: As given.
        device: Where checks compute.
        dtype: bf16 on a GPU.
    """

    def __init__(self, *, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16

    @property
    def on_gpu(self) -> bool:
        """Whether there is a device with a queue."""
        return self.device.type == "cuda"

    def sync(self) -> None:
        """Wait for everything that was started."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], *, rounds: int = 5, warm_up: int = 1) -> float:
        """The shortest of some rounds, each waited for."""
        for _ in range(warm_up):
            call()
        times = []
        for _ in range(1 if self.tiny else rounds):
            self.sync()
            started = time.perf_counter()
            call()
            self.sync()
            times.append(time.perf_counter() - started)
        return min(times)

    def peak_gb(self, call: Callable[[], Any]) -> float:
        """The most device memory that a call holds beyond what was there before, in 10^9 bytes; 0 on a CPU."""
        if not self.on_gpu:
            call()
            return 0.0
        self.sync()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def kernels(self, call: Callable[[], Any]) -> Kernels:
        """What a call starts."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        with profile(activities=activities) as record:
            call()
            self.sync()
        device = "CUDA" if self.on_gpu else "CPU"
        events = [event for event in record.events() if str(event.device_type).endswith(device)]
        busy = sum(getattr(event, "self_device_time_total", 0.0) for event in events) / 1e3
        by_name: dict[str, list[float]] = {}
        for event in events:
            by_name.setdefault(event.name, []).append(getattr(event, "self_device_time_total", 0.0) / 1e3)
        times = sorted(((name[:90], len(each), round(sum(each), 3)) for name, each in by_name.items()), key=_longest)
        return Kernels(len(events), busy, tuple(sorted(by_name)), tuple(times[:LISTED]))

    @cached_property
    def matrix_rate(self) -> float:
        """Operations per second of one large matrix product in `dtype` on random numbers, measured."""
        size = 256 if self.tiny else 8192
        a, b = (self.normal(size, size) for _ in range(2))
        product = torch.empty(size, size, device=self.device, dtype=self.dtype)
        return 2 * size**3 / self.seconds(lambda: torch.mm(a, b, out=product), rounds=10, warm_up=3)

    def normal(self, *shape: int, deviation: float = 1.0) -> Tensor:
        """Random numbers of `dtype`."""
        return torch.randn(*shape, device=self.device).mul_(deviation).to(self.dtype)

    def folder(self) -> Path:
        """A new empty folder."""
        return Path(tempfile.mkdtemp(prefix="nemo-minitron-gpu-"))

    def clear(self) -> None:
        """Give back memory that nobody uses, and the places of processes."""
        from nemo_minitron.parallel.fused_linear import WORKSPACE

        WORKSPACE.clear()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def machine(self) -> dict[str, Any]:
        """Device, driver and versions."""
        found: dict[str, Any] = {"device": "CPU", "python": platform.python_version(), "versions": _versions()}
        if self.on_gpu:
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "device": properties.name,
                "memory_gb": round(properties.total_memory / 1e9, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
                "driver": _driver(),
            }
        return found


def _longest(kernel: tuple[str, int, float]) -> float:
    return -kernel[2]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (asked.stdout.strip().splitlines() or ["unknown"])[0]
