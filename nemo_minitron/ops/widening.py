"""The dtype that sums and exponentials are taken in."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """A tensor of 16 bits as fp32; any other as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
