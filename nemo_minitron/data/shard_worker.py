"""A process that makes shards: `python -m nemo_minitron.data.shard_worker`, started and fed by `shard_pool`.

It reads pickles from its standard input, first the job, then units, and answers each unit with its counts or an error.
"""

import ctypes
import os
import pickle
import signal
import sys
from contextlib import suppress
from typing import IO

from nemo_minitron.data.shards import ShardJob, Unit, make_shard
from nemo_minitron.errors import MinitronError

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Work until the input ends."""
    _die_with_parent()
    with suppress(BrokenPipeError):  # the parent is gone, where the system does not tell
        _work()


def _work() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of the group; the parent ends this process
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not come between answers
    job: ShardJob = pickle.load(sys.stdin.buffer)
    while (unit := _next(sys.stdin.buffer)) is not None:
        try:
            answer: object = make_shard(job, unit)
        except (MinitronError, OSError) as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


def _next(stream: IO[bytes]) -> Unit | None:
    try:
        unit: Unit = pickle.load(stream)
    except EOFError:
        return None
    return unit


def _die_with_parent() -> None:
    """End this process when the one that started it, whose id is the argument, ends, however it does (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it ended before the system was asked
        sys.exit(0)


if __name__ == "__main__":
    main()
