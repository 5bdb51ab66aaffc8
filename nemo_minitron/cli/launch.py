"""Start several ranks on this machine, as torchrun would, and end them together.

Rank 0 owns the terminal. The others' output is kept aside and shown only if one of them fails where rank 0 did not.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

_GRACE = 60.0
"""Seconds that ranks have to save and stop after one of them failed or was stopped."""
_SHARED_ERROR = 3.0
"""Seconds in which an error that all ranks see ends all of them; rank 0 says it."""
_PR_SET_PDEATHSIG = 1


def start(arguments: Sequence[str], *, ranks: int) -> int:
    """Run `python -m nemo_minitron ARGUMENTS` as that many ranks; returns the exit status of the first that failed.

    SIGTERM, SIGUSR1 and SIGINT go on to every rank; a rank whose launcher dies is ended by the system.
    """
    with tempfile.TemporaryDirectory(prefix="nemo_minitron_") as folder:
        errors = [Path(folder) / f"rank{rank}.err" for rank in range(ranks)]
        port = _free_port()
        processes = [_spawn(arguments, rank, ranks, port, errors[rank]) for rank in range(ranks)]
        previous = {number: signal.signal(number, _forwarder(processes)) for number in _FORWARDED}
        try:
            return _wait(processes, errors)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def _spawn(arguments: Sequence[str], rank: int, ranks: int, port: int, errors: Path) -> "subprocess.Popen[bytes]":
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "nemo_minitron", *arguments]
    with errors.open("wb") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL if rank else None,
            stdout=subprocess.DEVNULL if rank else None,
            stderr=file if rank else None,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - the launcher has no threads
        )


def _die_with_parent() -> None:
    """In the new process: ask Linux for SIGKILL when the launcher dies, so that no rank goes on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _forwarder(processes: "Sequence[subprocess.Popen[bytes]]") -> Callable[[int, FrameType | None], None]:
    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return forward


def _wait(processes: "Sequence[subprocess.Popen[bytes]]", errors: Sequence[Path]) -> int:
    """Wait for all, or for the first failure, after which nobody can go on."""
    while True:
        states = [process.poll() for process in processes]
        failed = next((rank for rank, state in enumerate(states) if state), None)
        if failed is not None:
            break
        if all(state == 0 for state in states):
            return 0
        time.sleep(0.05)
    status = _shell_status(processes[failed].returncode)
    _settle(processes, _SHARED_ERROR if status < 128 else _GRACE)
    if not processes[0].returncode:
        text = errors[failed].read_text(encoding="utf-8", errors="replace").strip() if failed else ""
        print(text or f"rank {failed} ended with status {status}", file=sys.stderr, flush=True)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _settle(processes, _GRACE)
    return status


def _settle(processes: "Sequence[subprocess.Popen[bytes]]", seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _shell_status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
