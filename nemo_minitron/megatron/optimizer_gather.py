"""Two mends of Megatron's checkpoints of the distributed optimizer (0.15 to 0.19).

To save, Megatron gives each data-parallel rank the moments and master weights of all of them, 12 bytes a parameter in
host memory, although one rank writes them. Here that rank alone gets them. To load, all read what they need, as before.

For a checkpoint, Megatron gathers moments and master weights of a gradient buffer and leaves out the padding at the end
of each bucket; then it takes each parameter from where it lies in the buffer with the padding. So, where gradients lie
in several buckets, all that is behind the first padded one is stored shifted, under a warning of "data corruption".
There are several under `overlap_grad_reduce`, and where pipeline stages share a tied embedding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def gathered_once(optimizer: Any) -> Iterator[None]:
    """Inside the block, what Megatron's optimizer gathers to save it goes to one rank, and lies as in its buffers.

    Args:
        optimizer: Megatron's; parts that are not the distributed optimizer stay as they are.
    """
    with ExitStack() as stack:
        for part in optimizer.chained_optimizers:
            if hasattr(part, "get_parameter_state_dp_zero"):
                stack.enter_context(_mended(part))
        yield


@contextmanager
def _mended(part: Any) -> Iterator[None]:
    gather = part.get_parameter_state_dp_zero

    def mended(*, empty_data: bool = False, return_on_all_ranks: bool = False, **how: Any) -> Any:
        state = gather(empty_data=empty_data, return_on_all_ranks=return_on_all_ranks and empty_data, **how)
        if state is None:  # data-parallel rank 0 alone has it
            return None
        for index, buffer in enumerate(part.buffers):
            if _has_inner_padding(buffer):
                for tensors in state[index].values():
                    for key in [key for key, value in tensors.items() if isinstance(value, Tensor)]:
                        tensors[key] = spread(tensors[key], buffer)  # one after the other: they are large
        return state

    part.get_parameter_state_dp_zero = mended
    try:
        yield
    finally:
        del part.get_parameter_state_dp_zero


def spread(joined: Tensor, buffer: Any) -> Tensor:
    """Values of a buffer's buckets that follow each other without padding, `[n]`, where the buffer has them, `[N]`."""
    padded = joined.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + size] = joined[start : start + size]
        start += size
    return padded


def _has_inner_padding(buffer: Any) -> bool:
    return any(bucket.numel_unpadded < bucket.grad_data.numel() for bucket in buffer.buckets[:-1])
