"""Memory for large tensors that are soon thrown away, used again and again.

New memory is slow: the system clears it page by page as it is touched, which costs more than reading a tensor from the
page cache. Converting a checkpoint asks for new memory several times its size; with this, for the few largest tensors.
"""

import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import Lock

import torch
from torch import Tensor

_SMALLEST = 1 << 20
"""Bytes below which the ordinary allocator recycles memory well by itself."""

_HUGE = 1 << 28


class _Pool:
    """Blocks of memory; a block is free when no tensor over it is alive."""

    def __init__(self) -> None:
        self._blocks: list[mmap.mmap] = []
        self._lock = Lock()

    def take(self, nbytes: int) -> Tensor:
        """A byte tensor over the smallest free block that suits it, or over a new one in place of those that do not.

        A block suits what it holds; a huge one, only what fills a quarter of it, so that it does not linger.
        """
        with self._lock:
            sizes = {index: len(self._blocks[index]) for index in range(len(self._blocks)) if self._is_free(index)}
            suiting = [index for index in sizes if nbytes <= sizes[index] <= max(4 * nbytes, _HUGE)]
            if suiting:
                block = self._blocks[min(suiting, key=sizes.__getitem__)]
            else:
                for index in sorted(sizes, reverse=True):
                    if sizes[index] < nbytes or sizes[index] > _HUGE:
                        del self._blocks[index]
                # Private, because the system has large pages for private memory; shared is Python's default.
                block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    block.madvise(mmap.MADV_HUGEPAGE)
                self._blocks.append(block)
            return torch.frombuffer(block, dtype=torch.uint8, count=nbytes)

    def _is_free(self, index: int) -> bool:
        # A tensor made by frombuffer holds a reference; two are the list's and getrefcount's own.
        return sys.getrefcount(self._blocks[index]) == 2


_pools: list[_Pool] = []


@contextmanager
def recycled_memory() -> Iterator[None]:
    """While it lasts, `empty` reuses the memory of tensors that are gone. At its end free memory goes back at once.

    Tensors may be kept as long as anybody likes; their memory is not reused before they are gone.
    """
    pool = _Pool()
    _pools.append(pool)
    try:
        yield
    finally:
        _pools.remove(pool)


class Workspace:
    """Buffers that outlive a call. On a CPU fresh memory costs as much as a matrix product: the system zeroes it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer with arbitrary contents; the next call with the same name and dtype may return the same memory."""
        if device.type != "cpu":  # accelerators' allocators keep memory themselves
            return torch.empty(shape, dtype=dtype, device=device)
        size = prod(shape)
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(*shape)

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, in recycled memory where that is on and the tensor is large."""
    nbytes = prod(shape) * dtype.itemsize
    if not _pools or nbytes < _SMALLEST:
        return torch.empty(shape, dtype=dtype)
    return _pools[-1].take(nbytes).view(dtype).view(shape)
