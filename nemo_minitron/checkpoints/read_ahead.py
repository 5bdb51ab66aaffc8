"""Reading the next tensors while the last one is written, so that neither the disk nor a processor waits."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from nemo_minitron.ops.memory import recycled_memory

MOST_BYTES = 1 << 29
"""Tensors wait to be written only while they are together no larger than this."""

_WORKERS = 2


def read_ahead(names: Iterable[str], get: Callable[[str], Tensor], size: Callable[[str], int]) -> Iterator[Tensor]:
    """`get(name)` of every name, in order. Large tensors come in memory that is used again when they are gone.

    `get` is called from several threads at once; its first error ends everything, in the order of the names. `size`
    gives the bytes of what it will return.
    """
    waiting: deque[tuple[Future[Tensor], int]] = deque()
    remaining = deque((name, size(name)) for name in names)
    with recycled_memory(), ThreadPoolExecutor(_WORKERS, thread_name_prefix="read-ahead") as workers:
        try:
            used = 0  # bytes of the tensor that the caller has
            while remaining or waiting:
                while remaining and _is_room(remaining[0][1], used + sum(item[1] for item in waiting), len(waiting)):
                    name, nbytes = remaining.popleft()
                    waiting.append((workers.submit(get, name), nbytes))
                future, used = waiting.popleft()
                tensor = future.result()
                del future
                yield tensor
                del tensor
        finally:
            for future, _ in waiting:
                future.cancel()


def _is_room(nbytes: int, held: int, waiting: int) -> bool:
    """Whether another tensor may be begun: at least one, and no more than the workers can turn to."""
    return waiting == 0 or (waiting <= _WORKERS and held + nbytes <= MOST_BYTES)
