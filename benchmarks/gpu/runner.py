"""Runs checks one after another in a process of their own, within a given time; none stops the others."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT = 240.0
"""Seconds in which the process must be ready: it imports torch and finds the card."""
TINY_PATIENCE = 4
"""A check's limit is multiplied by this on a CPU, which others may be using."""
LOG_TAIL = 4000
"""Characters of the log that are kept of a check whose process ended."""


class LostWorkerError(Exception):
    """The process ended, or gave no answer in time.

    Attributes:
        log: The end of what it printed.
    """

    def __init__(self, what: str, log: str) -> None:
        super().__init__(what)
        self.log = log


class Worker:
    """The process that runs checks.

    Args:
        tiny: Small sizes, on a CPU.
        modules: Further modules with checks.
        timeout: Seconds in which it must be ready.

    Attributes:
        hello: Its checks and its machine.

    Raises:
        LostWorkerError: It did not start.
    """

    def __init__(self, *, tiny: bool, modules: Sequence[str], timeout: float) -> None:
        reading, writing = os.pipe()
        options = ["--tiny"] if tiny else []
        for module in modules:
            options += ["--module", module]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # A process that is killed cannot clear what it and its libraries have put there.
        self._temporary = tempfile.TemporaryDirectory(prefix="nemo-minitron-gpu-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", "--answers", str(writing), *options],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            env=_environment(self._temporary.name),
            text=True,
        )
        os.close(writing)
        self._answers = os.fdopen(reading, "rb", buffering=0)
        self._unread = b""
        self.hello = self._next(timeout)

    def ask(self, name: str, timeout: float) -> dict[str, Any]:
        """Run a check; its answer.

        Raises:
            LostWorkerError: The process ended, or took longer than `timeout` seconds. It is gone then.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading says how it ended
        return self._next(timeout)

    def log(self) -> str:
        """The end of what the process printed."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - LOG_TAIL))
        return self._log.read().decode(errors="replace")

    def stop(self) -> None:
        """End the process, at once."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._answers.close()
        self._temporary.cleanup()

    def _next(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.stop()
                    raise LostWorkerError(f"no answer in {timeout:.0f} s", self.log())
                part = self._answers.read(1 << 16)
                if not part:
                    status = self._process.wait()
                    how = f"by signal {-status}" if status < 0 else f"with status {status}"
                    self.stop()
                    raise LostWorkerError(f"its process ended {how}", self.log())
                self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run.

    Attributes:
        tiny: Small sizes, on a CPU.
        budget: Seconds for everything, the start of processes included.
        only: Names of checks; empty for all.
        modules: Further modules with checks.
    """

    tiny: bool
    budget: float
    only: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()


Watcher = Callable[[dict[str, Any], dict[str, Any], list[dict[str, Any]]], None]
"""Told after every check: the machine, the check with its result, all results so far."""


def run(plan: Plan, watch: Watcher) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the checks, most valuable first, until the time is over.

    Returns:
        The machine, and each check with its result: `state` is `passed`, `failed` (it computed something wrong),
        `error` (it could not end) or `skipped`.

    Raises:
        LostWorkerError: No process for checks could be started.
    """
    end = time.monotonic() + plan.budget
    start = _Starter(plan, end)
    worker: Worker | None = start()
    machine, checks = worker.hello["machine"], worker.hello["checks"]
    results: list[dict[str, Any]] = []
    for check in _chosen(checks, plan.only):
        result, worker = _one(check, worker, start, end, tiny=plan.tiny)
        results.append({**check, **result})
        watch(machine, results[-1], results)
    if worker is not None:
        worker.stop()
    return machine, results


class _Starter:
    def __init__(self, plan: Plan, end: float) -> None:
        self._plan, self._end = plan, end

    def __call__(self) -> Worker:
        limit = min(START_LIMIT, max(1.0, self._end - time.monotonic()))
        return Worker(tiny=self._plan.tiny, modules=self._plan.modules, timeout=limit)


def _one(
    check: dict[str, Any], worker: Worker | None, start: _Starter, end: float, *, tiny: bool
) -> tuple[dict[str, Any], Worker | None]:
    """A check's result, and the process to go on with; None if there is none."""
    expected = min(check["seconds"], 5.0) if tiny else check["seconds"]
    left = end - time.monotonic()
    if expected > left:
        said = f"no time: it takes about {expected:.0f} s, and {max(0.0, left):.0f} s are left"
        return {"state": "skipped", "figure": said, "seconds": 0.0}, worker
    began = time.monotonic()
    try:
        worker = worker or start()
        limit = check["limit"] * (TINY_PATIENCE if tiny else 1)
        answer = worker.ask(check["name"], min(limit, end - time.monotonic()))
    except LostWorkerError as lost:
        seconds = round(time.monotonic() - began, 2)
        return {"state": "error", "figure": str(lost), "log": lost.log, "seconds": seconds}, None
    if answer.pop("broken", False):
        worker.stop()
        worker = None
    return answer, worker


def _chosen(checks: Sequence[dict[str, Any]], only: frozenset[str]) -> list[dict[str, Any]]:
    if unknown := only - {check["name"] for check in checks}:
        raise LostWorkerError(f"no check is called {', '.join(sorted(unknown))}", "")
    return [check for check in checks if not only or check["name"] in only]


def _environment(temporary: str) -> dict[str, str]:
    """What has been compiled for the card stays outside of the temporary folder, for the next process."""
    compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    return {
        "TORCHINDUCTOR_CACHE_DIR": compiled,
        **os.environ,
        "TMPDIR": temporary,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:], *_python_path()]),
    }


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
