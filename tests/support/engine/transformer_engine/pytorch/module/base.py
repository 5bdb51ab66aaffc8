"""What Megatron takes from `transformer_engine.pytorch.module.base`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def get_dummy_wgrad(shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """A gradient that nobody is to read: the original hands out stale memory, here it is NaN."""
    return torch.full(tuple(shape), 0.0 if zero else torch.nan, dtype=dtype)
