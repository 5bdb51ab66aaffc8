"""A mend of Megatron's checkpoints of the distributed optimizer (0.15 to 0.19), where gradients lie in several buckets.

For a checkpoint, Megatron gathers moments and master weights of a gradient buffer and leaves out the padding at the end
of each bucket; then it takes each parameter from where it lies in the buffer with the padding. So all that is behind
the first padded bucket is stored shifted, under a warning of "data corruption". There are several buckets under
`overlap_grad_reduce`, and where pipeline stages share a tied embedding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def padding_kept(optimizer: Any) -> Iterator[None]:
    """Inside the block, what Megatron's optimizer gathers for a checkpoint lies as in its gradient buffers.

    Args:
        optimizer: Megatron's; parts that are not the distributed optimizer stay as they are.
    """
    with ExitStack() as stack:
        for part in optimizer.chained_optimizers:
            if hasattr(part, "get_parameter_state_dp_zero") and any(map(_has_inner_padding, part.buffers)):
                stack.enter_context(_mended(part))
        yield


@contextmanager
def _mended(part: Any) -> Iterator[None]:
    gather = part.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **kwargs: Any) -> Any:
        state = gather(*args, **kwargs)
        if state is None:  # Megatron's data-parallel rank 0 alone has it
            return None
        for index, buffer in enumerate(part.buffers):
            for tensors in state[index].values():
                tensors.update({key: spread(x, buffer) for key, x in tensors.items() if isinstance(x, Tensor)})
        return state

    part.get_parameter_state_dp_zero = gather_with_padding
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
