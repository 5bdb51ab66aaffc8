"""The largest tensor that a piece of code makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the most elements of any result."""

    def __init__(self):
        super().__init__()
        self.matrices = 0
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.numel())
        products = (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.mkldnn._linear_pointwise)
        self.matrices += func.overloadpacket in products
        return result
