"""Being asked to stop: at once between steps of ordinary stages, after a save in training.

SIGTERM (a scheduler ends the job), SIGUSR1 (it is about to) and SIGINT (Ctrl-C) all mean: stop, keep what is done.
A training stage polls `requested()` between steps, saves, and calls `stop()`; in every other stage the signal raises
`Stopped` where it strikes. A second SIGINT always does.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
RUN_AGAIN = os.EX_TEMPFAIL
"""Exit status (75) after a scheduler's signal: what was done is saved, and the same command goes on. Batch scripts
queue the job again on it, and on no other."""


class Stopped(BaseException):
    """The run was asked to stop and has. Not an `Exception`: a broad `except` in a library must not swallow it."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)

    @property
    def exit_status(self) -> int:
        """`RUN_AGAIN`; for Ctrl-C 130, since who pressed it does not want the job to be queued again."""
        return 128 + self.signal if self.signal == signal.SIGINT else RUN_AGAIN


class _State:
    pending: int | None = None
    deferring: bool = False


def requested() -> bool:
    """Whether a stop is asked for and still to be followed. Cheap: meant to be polled every step, on every rank."""
    return _State.pending is not None


def follow() -> None:
    """Stop now if asked to.

    Raises:
        Stopped: Once per request.
    """
    if _State.pending is not None:
        number, _State.pending = _State.pending, None
        raise Stopped(number)


def stop() -> NoReturn:
    """End this rank's part of a stop that all ranks have agreed on; the signal may have reached another one only.

    Raises:
        Stopped: Always.
    """
    follow()
    raise Stopped(signal.SIGTERM)


def take() -> dict[int, Any]:
    """Put our handlers in place (Lightning puts its own there when training starts); returns what they replace."""
    return {number: signal.signal(number, _receive) for number in SIGNALS}


@contextmanager
def handled() -> Iterator[None]:
    """Take over the signals inside the block and give them back after it. Only the main thread may."""
    previous = take()
    try:
        yield
    finally:
        _State.pending = None
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the block a signal is only noted; what is still pending at the end is followed there."""
    before, _State.deferring = _State.deferring, True
    try:
        yield
    finally:
        _State.deferring = before
    if not before:
        follow()


def _receive(number: int, frame: FrameType | None) -> None:
    again = number == signal.SIGINT and _State.pending == signal.SIGINT
    _State.pending = number
    if not _State.deferring or again:
        follow()
    elif number == signal.SIGINT:
        print("\nstopping after a save; Ctrl-C again stops at once", file=sys.stderr, flush=True)
