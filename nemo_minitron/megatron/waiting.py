"""A rank that waits for another one says so: collectives wait inside C++, without a word."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

FIRST_WORD = 5.0
"""Seconds until a rank says that it waits."""
NEXT_WORD, LONGEST = 60.0, 600.0
"""Seconds until it says so again; each time twice as many, up to the second number."""


@contextmanager
def said(rank: int, world_size: int, local_rank: int, source: int, what: str) -> Iterator[None]:
    """Inside the block, say now and then on stderr that ranks wait for another one.

    The first rank that waits speaks for all, and the first one of every other machine for those there.

    Args:
        rank: This one.
        world_size: Of all.
        local_rank: Rank among the processes of this machine.
        source: Whom they wait for.
        what: What that one does; empty where it is not known.
    """
    first = 1 if source == 0 else 0
    if rank == source or (rank != first and local_rank != 0):
        yield
        return
    who = f"rank {rank} and {world_size - 2} more wait" if rank == first and world_size > 2 else f"rank {rank} waits"
    told = f"{who} for rank {source}{f', which {what}' if what else ''}"
    done = threading.Event()
    thread = threading.Thread(target=_speak, args=(told, done), name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _speak(told: str, done: threading.Event) -> None:
    began = time.monotonic()
    pause, following = FIRST_WORD, NEXT_WORD
    while not done.wait(pause):
        print(f"{told}: {time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)
        pause, following = following, min(2 * following, LONGEST)
