"""Start several ranks on this machine, as torchrun would, and end them together.

Rank 0 owns the terminal. The others' output is kept aside and shown only if one of them fails where rank 0 did not. A
rank that the system kills says nothing, and the others know only that it is gone; so the launcher speaks for them.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import IO

from nemo_minitron.cli import threads
from nemo_minitron.megatron.launched import LISTENER
from nemo_minitron.stages.processes import LAUNCHED
from nemo_minitron.stages.run_folder import RunFolder
from nemo_minitron.stages.signals import RUN_AGAIN, SIGNALS, Stopped

_GRACE = 60.0
"""Seconds that ranks have to save and stop after one of them failed or was stopped."""
_SHARED_ERROR = 3.0
"""Seconds in which an error that all ranks see ends all of them; rank 0 says it."""
_LOST = 10.0
"""Seconds in which the other ranks notice that one was killed; they cannot save without it."""
_PR_SET_PDEATHSIG = 1


def start(arguments: Sequence[str], *, ranks: int, run: Path) -> int:
    """Run `python -m nemo_minitron ARGUMENTS` as that many ranks; returns the exit status of the first that failed.

    SIGTERM, SIGUSR1 and SIGINT go on to every rank; a rank whose launcher dies is ended by the system.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        # Files without a name: whoever is killed leaves none.
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(ranks)]
        environment = dict(os.environ)
        threads.choose(ranks=ranks, environment=environment)  # once: the first rank makes the machine busy
        environment |= {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            LAUNCHED: "1",
        }
        processes = [_spawn(arguments, rank, environment, errors[rank], listener) for rank in range(ranks)]
        listener.close()  # rank 0 has it
        asked: list[int] = []
        previous = {number: signal.signal(number, _forwarder(processes, asked)) for number in SIGNALS}
        try:
            return _wait(processes, errors, asked, run)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _spawn(
    arguments: Sequence[str], rank: int, shared: Mapping[str, str], errors: IO[bytes], listener: socket.socket
) -> "subprocess.Popen[bytes]":
    environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == 0:
        environment[LISTENER] = str(listener.fileno())
    command = [sys.executable, "-m", "nemo_minitron", *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL if rank else None,
        stdout=subprocess.DEVNULL if rank else None,
        stderr=errors if rank else None,
        pass_fds=() if rank else (listener.fileno(),),
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - the launcher has no threads
    )


def _die_with_parent() -> None:
    """In the new process: ask Linux for SIGKILL when the launcher dies, so that no rank goes on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _forwarder(
    processes: "Sequence[subprocess.Popen[bytes]]", asked: list[int]
) -> Callable[[int, FrameType | None], None]:
    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return forward


def _wait(
    processes: "Sequence[subprocess.Popen[bytes]]", errors: Sequence[IO[bytes]], asked: Sequence[int], run: Path
) -> int:
    """Wait for all, or for the first failure, after which nobody can go on."""
    failed = _first_failure(processes)
    if failed is None:
        return 0
    code = processes[failed].returncode
    if asked or code == RUN_AGAIN:
        _settle(processes, _GRACE)
        return _status([process.poll() or 0 for process in processes], asked)
    if code < 0:
        print(_told_as_lost(failed, -code, run), file=sys.stderr, flush=True)
        _settle(processes, _LOST)
        return 128 - code
    _settle(processes, _SHARED_ERROR)
    if not processes[0].returncode:
        text = _said(errors[failed]) if failed else ""
        print(text or f"rank {failed} ended with status {code}", file=sys.stderr, flush=True)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _settle(processes, _GRACE)
    return code


def _said(errors: IO[bytes]) -> str:
    """What a rank that has ended wrote there."""
    errors.seek(0)
    return errors.read().decode("utf-8", errors="replace").strip()


def _first_failure(processes: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """Wait for it; a rank that was killed comes before those that fail for want of it. None: all ended well."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return min(failed, key=lambda rank: (codes[rank] or 0) >= 0)
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _status(codes: Sequence[int], asked: Sequence[int]) -> int:
    """Of ranks that were asked to stop; some may have ended before they could take the signal themselves."""
    if RUN_AGAIN in codes:
        return RUN_AGAIN
    struck = next((number for number in asked if -number in codes), None)
    if struck is not None:
        return Stopped(struck).exit_status
    code = next((code for code in codes if code), 0)
    return 128 - code if code < 0 else code


def _told_as_lost(rank: int, number: int, run: Path) -> str:
    killer = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
    return f"error: rank {rank} was ended by {signal.Signals(number).name}{killer}\n  {RunFolder(run).where_to_go_on()}"


def _settle(processes: "Sequence[subprocess.Popen[bytes]]", seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.05)
