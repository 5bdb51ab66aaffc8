"""Ranks that work apart for a while: groups of neighbours, each a world of its own, that meet again at the end.

Inside a group everything is as in a run of that many processes: ranks count from 0, data parallelism is what the group
leaves of it, and no collective reaches another group. The groups know of each other through the store that the
processes first met through, and through connections that are used only to meet again.
"""

import base64
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from nemo_minitron.errors import LostRankError
from nemo_minitron.megatron import runtime

T = TypeVar("T")

APART = timedelta(days=2)
"""How long a group that is done waits for another one. A process that is gone is noticed at once, since its connections
break; a group whose ranks wait for each other in vain ends after `runtime.STALLED`, and with it all others."""

_partings = itertools.count()


@dataclass(frozen=True, kw_only=True)
class RankGroup:
    """A group of ranks that work apart from others."""

    number: int = 0
    count: int = 1
    """Groups in all."""
    rank: int = 0
    """This process's among all ranks."""
    store: Store | None = field(default=None, repr=False)
    """Shared by all groups; None where there is one."""

    def tickets(self, total: int) -> Iterator[int]:
        """Numbers below `total`, each of which one group gets: who is done early gets more. Collective in the group."""
        if self.store is None:
            yield from range(total)
            return
        while (number := runtime.broadcast_object(self._drawn())) < total:
            yield number

    def _drawn(self) -> int | None:
        assert self.store is not None, "with several groups"
        return self.store.add("tickets", 1) - 1 if runtime.current().rank == 0 else None


def most_groups() -> int:
    """How many groups there can be: as many as the layout fits in, if `start` made the connections."""
    here = runtime.current()
    return 1 if runtime.shared_store() is None else here.world_size // here.parallel.ranks


def in_groups(count: int, work: Callable[[RankGroup], T]) -> list[T]:
    """What `work` returns in each of `count` groups of equally many neighbouring ranks, on every rank. Collective.

    Args:
        count: Divides the number of ranks; 1 leaves everything as it is.
        work: Called on every rank, in its group. What it returns on the first rank of each travels pickled. Models and
            trainers that it makes must be gone when it returns.

    Raises:
        LostRankError: Another group has ended, or a rank of it is gone; says why where that is known.
    """
    whole = runtime.current()
    if count == 1:
        alone = work(RankGroup(rank=whole.rank))
        return [alone if whole.world_size == 1 else runtime.broadcast_object(alone)]
    met = runtime.shared_store()
    assert met is not None, "most_groups() is 1 otherwise"
    store = PrefixStore(f"apart/{next(_partings)}", met)
    # Every rank is past its last collective when all have come here, so that the groups may be taken down.
    everyone = ProcessGroupGloo(PrefixStore("everyone", store), whole.rank, whole.world_size, APART)
    size = whole.world_size // count
    number, rank = divmod(whole.rank, size)
    group = RankGroup(number=number, count=count, rank=whole.rank, store=store)
    runtime.move(PrefixStore(f"group/{number}", store), rank, size)
    try:
        value = work(group)
    except BaseException as error:
        _leave_word(store, f"rank {whole.rank}: {type(error).__name__}: {error}")
        raise
    if rank == 0:
        store.set(f"value/{number}", base64.b64encode(pickle.dumps(value)).decode())
    _meet(everyone, store)
    values: list[T] = [pickle.loads(base64.b64decode(store.get(f"value/{each}"))) for each in range(count)]
    runtime.move(PrefixStore("again", store), whole.rank, whole.world_size)
    return values


def _meet(everyone: ProcessGroupGloo, store: Store) -> None:
    try:
        everyone.barrier().wait()  # type: ignore[attr-defined]  # torch's stub lacks it
    except RuntimeError as error:
        if (told := _word(store)) is None:
            raise
        raise LostRankError(
            f"another group of ranks has ended: {told.splitlines()[0]}",
            rule="all groups go on, or none does",
            remedy="see what that rank says; the same command goes on behind what is done",
        ) from error


def _leave_word(store: Store, told: str) -> None:
    """Tell the others why this group ends, if they can still be told."""
    try:
        store.compare_set("ended", "", told)  # only the first reason
    except RuntimeError:  # the process that keeps the store is gone
        return


def _word(store: Store) -> str | None:
    """Why a group has ended."""
    try:
        return store.get("ended").decode(errors="replace") if store.check(["ended"]) else None
    except RuntimeError:
        return None
