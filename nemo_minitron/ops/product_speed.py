"""How fast this device multiplies matrices, and how much faster in one dtype than in another, in milliseconds."""

import time
from collections.abc import Callable

import torch

_ON_CPU, _ON_GPU = (64, 1024, 1024), (4096, 4096, 4096)
"""Rows, inner dimension and columns: about a millisecond. A small product on a GPU is the time of its launch."""
_PRODUCTS = 24
"""Products of each dtype, after the first one."""
_SECONDS = 1.0
"""Limit for all of them, on devices that are slow in one dtype."""


def product_speedup(device: torch.device, dtype: torch.dtype, base: torch.dtype) -> float:
    """Speed of a matrix product in `dtype` over that in `base`.

    On a CPU it is processor time that counts, so that other work on the machine does not change the ratio; on a GPU the
    clock. The two take turns and the best of each counts. The first product of each, in which kernels are chosen, does
    not.
    """
    products = [_Product(device, each) for each in (base, dtype)]
    for product in products:
        product.seconds()
    best = [product.seconds() for product in products]
    end = time.perf_counter() + _SECONDS
    for _ in range(_PRODUCTS):
        best = [min(seconds, product.seconds()) for seconds, product in zip(best, products, strict=True)]
        if time.perf_counter() > end:
            break
    return best[0] / best[1]


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in `dtype` by the clock, beside whatever else this machine does now."""
    product = _Product(device, dtype, clock=time.perf_counter)
    product.seconds()
    rows, inner, columns = _shape(device)
    return 2.0 * rows * inner * columns * _PRODUCTS / sum(product.seconds() for _ in range(_PRODUCTS))


def _shape(device: torch.device) -> tuple[int, int, int]:
    return _ON_GPU if device.type == "cuda" else _ON_CPU


class _Product:
    """A product as a linear layer does it."""

    def __init__(self, device: torch.device, dtype: torch.dtype, clock: Callable[[], float] | None = None) -> None:
        rows, inner, columns = _shape(device)
        generator = torch.Generator().manual_seed(0)
        self._input = torch.randn(rows, inner, generator=generator).to(device, dtype)
        self._weight = torch.randn(columns, inner, generator=generator).to(device, dtype)
        self._clock = clock or (time.perf_counter if device.type == "cuda" else time.process_time)

    @torch.no_grad()
    def seconds(self) -> float:
        """Time of one product."""
        start = self._clock()
        torch.nn.functional.linear(self._input, self._weight)
        if self._input.is_cuda:
            torch.cuda.synchronize(self._input.device)
        return max(self._clock() - start, 1e-9)
