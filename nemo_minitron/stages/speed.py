"""How much of a GPU a stage used: peak memory, and the fraction of the peak rate that its model computed at (MFU).

Looks at a GPU only where torch has started it, and loads nothing.
"""

import sys
from typing import Any

from nemo_minitron.estimate.compute import peak_flops_of


def reset_gpu_memory() -> None:
    """Start counting the peak of this process's GPU memory anew."""
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()


def peak_gpu_memory() -> dict[str, float]:
    """Peak memory of this process's GPU since `reset_gpu_memory`, in 10^9 bytes; empty without a GPU.

    `allocated` is what tensors held, `reserved` what torch's allocator took from the device for them. What NCCL and the
    CUDA context hold is not among them.
    """
    if (cuda := _cuda()) is None:
        return {}
    return {
        "allocated": round(cuda.max_memory_allocated() / 1e9, 3),
        "reserved": round(cuda.max_memory_reserved() / 1e9, 3),
    }


def gpu_name() -> str | None:
    """The name of this process's GPU; None where it computes on a CPU."""
    return None if (cuda := _cuda()) is None else str(cuda.get_device_name())


def mfu(tokens_per_second: float | None, flops_per_token: float, *, devices: int, gpu: str | None) -> float | None:
    """Model FLOPs utilisation: operations that the models need, over what the devices could do at their peak.

    Operations that recomputation repeats do not count (Chowdhery et al., arXiv:2204.02311, appendix B).

    Args:
        tokens_per_second: Over all devices; None before there is a measurement.
        flops_per_token: Of `estimate.compute`.
        devices: How many GPUs shared the work.
        gpu: Their name; None for a CPU.

    Returns:
        A fraction; None on a CPU, and for a GPU whose peak is not in the table.
    """
    peak = None if gpu is None else peak_flops_of(gpu)
    if peak is None or tokens_per_second is None:
        return None
    return round(tokens_per_second * flops_per_token / (devices * peak), 4)


def _cuda() -> Any:
    """`torch.cuda` if this process uses a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
