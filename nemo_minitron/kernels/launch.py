"""What all kernels share: sizes of a block, and the device they are launched on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

BLOCK = 2048
"""Columns that one program works on at a time: 8 a thread, one aligned load of 16 bits each."""
WARPS = 8
"""With such blocks the kernels take 25 to 99 registers per thread on sm_90, and spill none."""

EMPTY = -1e30
"""Stands for the maximum of no logits; unlike -inf it can be subtracted from itself."""


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
