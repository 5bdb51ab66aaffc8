"""The matrix products of a linear layer in fp32 on a CPU, from the library that is fast there.

`torch.mm` goes to MKL in fp32 (and to oneDNN in bf16). On processors that are not Intel's MKL has no AVX-512 code, and
is a little slower with AVX2 in the forward product, where it packs the weight; where few rows meet many columns, as in
an output layer, it packs slowly on any processor. oneDNN does better in these cases. The values differ by rounding
only. Everything is decided by facts about the processor, never by timing, so that a run which is resumed ends with
the same bytes.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_CPU_FACTS = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, *, wide: bool = False) -> Tensor:
    """`x @ weight.T`, without a graph of its own.

    `[..., h]` and `[n, h]` give `[..., n]`. `wide` says that few rows meet many columns, as in an output layer that
    takes its tokens in chunks.
    """
    if (wide or not is_intel()) and suits_onednn(x, weight):
        return _onednn(x, weight)
    return torch.matmul(x, weight.t())


def linear_input_gradient(grad: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`grad @ weight`, the gradient of `linear`'s input: `[..., n]` and `[n, h]` give `[..., h]`, in `out` if given."""
    if has_avx512() and not is_intel() and suits_onednn(grad, weight):
        result = _onednn(grad, weight.t())
        return result if out is None else out.copy_(result)
    return torch.matmul(grad, weight, out=out)


def has_avx512() -> bool:
    """Whether torch uses AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@lru_cache
def is_intel() -> bool:
    """Whether the processor is Intel's; so it is taken where nobody says."""
    try:
        facts = _CPU_FACTS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    return "GenuineIntel" in facts or "vendor_id" not in facts


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
