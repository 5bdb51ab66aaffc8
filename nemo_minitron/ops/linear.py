"""The matrix products of a linear layer in fp32 on a CPU, from the library that is fast there.

`torch.mm` goes to MKL in fp32 (and to oneDNN in bf16). MKL has no AVX-512 code for processors that are not Intel's, and
packs a weight slowly where few rows meet many columns, as in an output layer; oneDNN does better in both cases. The
values differ by rounding only. Everything is decided by facts about the processor, never by timing, so that a run which
is gone on with ends with the same bytes.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_CPU_FACTS = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, *, wide: bool = False) -> Tensor:
    """`x @ weight.T`, without a graph of its own.

    Args:
        x: `[..., h]`.
        weight: `[n, h]`.
        wide: Whether few rows meet many columns, as in an output layer that takes its tokens in chunks.

    Returns:
        `[..., n]`.
    """
    if (wide or mkl_is_slow()) and suits_onednn(x, weight):
        return _onednn(x, weight)
    return torch.matmul(x, weight.t())


def linear_input_gradient(grad: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`grad @ weight`, the gradient of `linear`'s input: `[..., n]` and `[n, h]` give `[..., h]`, in `out` if given."""
    if mkl_is_slow() and suits_onednn(grad, weight):
        result = _onednn(grad, weight.t())
        return result if out is None else out.copy_(result)
    return torch.matmul(grad, weight, out=out)


@lru_cache
def mkl_is_slow() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, so that MKL falls back to AVX2."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in _CPU_FACTS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can be asked for the product of two tensors: fp32 on a CPU, not empty."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return plain and x.numel() > 0 and weight.numel() > 0 and _has_onednn()


@lru_cache
def _has_onednn() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result
