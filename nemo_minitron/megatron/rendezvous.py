"""Where the ranks of a run meet: a rank that waits says for whom, and a signal ends the wait.

torch's own rendezvous waits inside C++, in silence, where no Python signal handler runs. Here the store is opened by a
thread, and the main thread asks now and then who has arrived.
"""

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from nemo_minitron.errors import LaunchError, LostRankError
from nemo_minitron.megatron import launched

_FIRST_WORD = 5.0
"""Seconds until a rank says that it waits."""
_NEXT_WORD = 60.0
"""Seconds until it says so again."""
_LONGEST_NAP = 0.5
_SHOWN = 8
"""Missing ranks that are named one by one."""

_meetings = itertools.count()


def meet(rank: int, world_size: int, *, timeout: timedelta) -> Store:
    """Wait until all ranks are here; returns the store through which they connect.

    Rank 0 serves the store at MASTER_ADDR and MASTER_PORT, unless torchrun's agent does.

    Raises:
        LaunchError: The address is missing or malformed, its port is taken, or two processes have the same rank.
        LostRankError: Ranks are missing after `timeout`.
    """
    host, port = _address(rank, world_size)
    wait = _Wait(rank, world_size, f"{host}:{port}", timeout)
    opened = _opened(lambda: _open(rank, world_size, host, port, timeout), wait, rank, port)
    store = PrefixStore(_meeting(), opened)
    _arrive(store, rank, world_size)
    while not store.check(["all"]):
        wait.nap(lambda: _missing(store, rank, world_size))
    return store


class _Wait:
    """The patience of one rank, and what it says meanwhile."""

    def __init__(self, rank: int, world_size: int, address: str, timeout: timedelta) -> None:
        self._rank, self._size, self._address = rank, world_size, address
        self._began = time.monotonic()
        self._limit = timeout.total_seconds()
        self._next_word = _FIRST_WORD
        self._nap = 0.01

    def nap(self, missing: Callable[[], list[int]], sleep: Callable[[float], None] = time.sleep) -> None:
        """Sleep a moment; now and then say who is missing. `missing` is empty where another rank speaks."""
        sleep(self._nap)
        self._nap = min(2 * self._nap, _LONGEST_NAP)
        waited = time.monotonic() - self._began
        if waited >= self._next_word:
            self._next_word = waited + _NEXT_WORD
            if names := missing():
                print(self._words(names, waited), file=sys.stderr, flush=True)
        if waited > self._limit:
            raise LostRankError(
                self._words(missing(), waited),
                rule=f"all ranks start within {self._limit:.0f} s of each other",
                remedy="look at the output of the missing ranks, or of what should have started them",
            )

    def _words(self, names: list[int], waited: float) -> str:
        count = f"{len(names)} of {self._size} ranks" if names else "the other ranks"
        shown = ", ".join(str(name) for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        told = launched.find().told
        return (
            f"rank {self._rank} has waited {waited:.0f} s at {self._address} for {count}"
            f"{f': {shown}{more}' if names else ''}{f' ({told})' if told else ''}; Ctrl-C ends it"
        )


def _opened(opening: Callable[[], Store], wait: _Wait, rank: int, port: int) -> Store:
    """The store, opened by a thread, so that signals are taken meanwhile."""
    stores: list[Store] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            stores.append(opening())
        except BaseException as error:  # whatever it is, the main thread raises it
            errors.append(error)

    thread = threading.Thread(target=work, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        wait.nap(lambda: [0] if rank else [], sleep=thread.join)
    if not errors:
        return stores[0]
    if "EADDRINUSE" in str(errors[0]):
        raise LaunchError(
            f"MASTER_PORT={port} is taken on {socket.gethostname()}: rank 0 cannot listen there",
            rule="rank 0 needs a free port, which all ranks know",
            remedy="set MASTER_PORT to another one for all ranks",
        ) from errors[0]
    raise errors[0]


def _open(rank: int, world_size: int, host: str, port: int, timeout: timedelta) -> Store:
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not by_agent
    listener = os.environ.pop(launched.LISTENER, None) if serves else None
    return dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        world_size,
        is_master=serves,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=serves and listener is None,
        master_listen_fd=None if listener is None else int(listener),
    )


def _arrive(store: Store, rank: int, world_size: int) -> None:
    """Tell the others; who comes last opens the door."""
    if store.add(f"here/{rank}", 1) > 1:
        raise LaunchError(
            f"two processes are rank {rank} of {world_size} ({launched.find().told})",
            rule="every rank is one process",
            remedy="end what is left of an earlier start, or set MASTER_PORT to another one for all ranks",
        )
    if store.add("count", 1) == world_size:
        store.set("all", "1")


def _missing(store: Store, rank: int, world_size: int) -> list[int]:
    """Ranks that are not here yet; none where a lower rank is here, which says it for all."""
    absent = []
    for other in range(world_size):
        if other == rank:
            continue
        if not store.check([f"here/{other}"]):
            absent.append(other)
        elif other < rank:
            return []
    return absent


def _meeting() -> str:
    """A name that no earlier meeting of these processes had: torchrun's store outlives them."""
    return f"meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_meetings)}"


def _address(rank: int, world_size: int) -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16:
        return host, int(port)
    raise LaunchError(
        f"MASTER_ADDR={host!r} MASTER_PORT={port!r} for rank {rank} of {world_size} ({launched.find().told})",
        rule="the host and the port (1 to 65535) of rank 0, the same on all ranks",
        remedy="start the ranks with torchrun or --nproc; before srun set both, as the file that `nemo-minitron submit "
        "--print` shows; or unset the rank's variables to run alone",
    )
