"""Bytes of tensors: to a stream and back without a copy in between."""

from typing import BinaryIO

import torch
from torch import Tensor

from nemo_minitron.errors import CheckpointError
from nemo_minitron.ops.memory import empty


def write_tensor(stream: BinaryIO, tensor: Tensor) -> int:
    """Write a tensor's elements, row-major, little-endian.

    Returns:
        Number of bytes written.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    stream.write(data.numpy().data)
    return data.numel()


def read_tensor(stream: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype, *, where: str) -> Tensor:
    """Read the elements of a tensor from where the stream stands.

    Raises:
        CheckpointError: The stream ends too early.
    """
    tensor = empty(shape, dtype)
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{where}: file ends {len(view) - done} bytes too early", remedy="fetch it again")
        done += count
    return tensor
