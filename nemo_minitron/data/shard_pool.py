"""Make the shards of a job: those that are missing, in as many processes as are given."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nemo_minitron.cores import allowed_cores
from nemo_minitron.data.claims import Claims, clear_claims
from nemo_minitron.data.shards import Shard, ShardJob, Unit, make_shard, shard_bytes, shard_path, units
from nemo_minitron.errors import DataError

Counts = list[dict[str, Any]]
Done = Callable[[Unit, Counts], None]

_JOB = "job.json"
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 30.0
_PATIENCE = 4
"""Times what a shard takes here, that another node may take for one."""
_FORMAT = 1


def default_workers() -> int:
    """As many as this machine's share of threads, for all ranks of a run on it: one of them makes data, others wait.

    `OMP_NUM_THREADS`, which the command line sets to the cores that it may use, is what one rank has. The 1 that
    torchrun sets for several ranks, asked or not, says nothing.
    """
    cores = allowed_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if not threads.isdigit() or int(threads) < 1 or (threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        return cores
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(cores, int(threads) * (int(ranks) if ranks.isdigit() else 1))


def prepare(job: ShardJob) -> int:
    """Make the shards' folder, or take it up if it is of the same job; returns how many shards of another job went."""
    identity = _identity(job)
    path = job.folder / _JOB
    lost = 0
    if job.folder.is_dir() and (not path.is_file() or path.read_text(encoding="utf-8") != identity):
        lost = len(list(job.folder.glob("*.npz")))
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    for leftover in job.folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    clear_claims(job.folder)
    if not path.is_file():
        temporary = path.with_name(f".{_JOB}.{os.getpid()}.tmp")
        temporary.write_text(identity, encoding="utf-8")
        temporary.replace(path)
    return lost


def finished(job: ShardJob) -> list[Shard]:
    """The shards that an earlier attempt has left."""
    return [Shard(path) for path in sorted(job.folder.glob("[0-9]*.npz"))]


def make_shards(job: ShardJob, workers: int, done: Done, claims: Claims | None = None) -> list[Shard]:
    """Every shard of a job, in order; those that an earlier attempt has finished are taken as they are.

    With `claims`, other nodes make shards of the same job at the same time (`help_with`). Those that they do not
    finish are made here.

    Args:
        job: What to do; `prepare` has been called.
        workers: Processes; with one, or with one shard, this process works itself, on all cores that the `tokenizers`
            library uses.
        done: Called for each new shard, in the order in which they come, with its counts. An exception of it ends the
            work.
        claims: This node's; None where it works alone.

    Raises:
        DataError: A file is damaged, or a token is outside the vocabulary.
    """
    began, todo = time.monotonic(), _Todo(job, done, claims)
    try:
        made = _make(job, workers, todo.own(), done)
        if todo.others:
            todo.wait(_PATIENCE_SECONDS + _PATIENCE * workers * (time.monotonic() - began) / max(made, 1))
    except BaseException:
        if claims is not None:
            claims.stop()
        raise
    return [Shard(shard_path(job.folder, number)) for number in todo.numbers]


def help_with(job: ShardJob, workers: int, claims: Claims) -> int:
    """Make shards of a job that another node looks after, until none is left to claim; returns how many.

    Raises:
        DataError: A file is damaged or not here, or a token is outside the vocabulary. What was claimed is given up:
            the other node meets the same fault, or has what is missing here.
    """
    try:
        return _make(job, workers, _Todo(job, _nothing, claims).own(), _nothing)
    except BaseException:
        claims.give_up()
        raise


def _nothing(unit: Unit, counts: Counts) -> None:
    """Nobody counts on this node."""


def _make(job: ShardJob, workers: int, missing: Iterator[Unit], done: Done) -> int:
    """Make shards in this process or in several; returns how many."""
    made = 0

    def counted(unit: Unit, counts: Counts) -> None:
        nonlocal made
        made += 1
        done(unit, counts)

    first = list(islice(missing, 2))
    if workers < 2 or len(first) < 2:
        for unit in chain(first, missing):
            counted(unit, make_shard(job, unit))
    else:
        _in_processes(job, workers, chain(first, missing), counted)
    return made


class _Todo:
    """The shards of a job in order: which this node makes, and which it waits for.

    Attributes:
        numbers: Of all shards, as far as `own` has come.
        others: Shards that other nodes have claimed.
    """

    def __init__(self, job: ShardJob, done: Done, claims: Claims | None) -> None:
        self._job, self._done, self._claims = job, done, claims
        self._earlier = {shard.path for shard in finished(job)}
        self.numbers: list[int] = []
        self.others: list[Unit] = []

    def own(self) -> Iterator[Unit]:
        """What is missing and nobody else has claimed."""
        for unit in units(self._job.files, shard_bytes(self._job.files)):
            self.numbers.append(unit.number)
            path = shard_path(self._job.folder, unit.number)
            if path.is_file():
                if path not in self._earlier:
                    self._done(unit, Shard(path).parts())
            elif self._claims is None or self._claims.take(unit.number):
                yield unit
            else:
                self.others.append(unit)

    def wait(self, patience: float) -> None:
        """Wait for the other nodes' shards; make those that are given up, or have not come for `patience` seconds."""
        assert self._claims is not None, "who works alone waits for nobody"
        latest = time.monotonic()
        while self.others:
            come = [unit for unit in self.others if shard_path(self._job.folder, unit.number).is_file()]
            for unit in come:
                self.others.remove(unit)
                self._done(unit, Shard(shard_path(self._job.folder, unit.number)).parts())
            late = time.monotonic() - latest > patience
            left = [unit for unit in self.others if late or not self._claims.is_taken(unit.number)]
            if left:
                self.others.remove(left[0])
                self._done(left[0], make_shard(self._job, left[0]))
            elif not come:
                time.sleep(_POLL_SECONDS)
                continue
            if come:
                latest = time.monotonic()


def _identity(job: ShardJob) -> str:
    """What a shard depends on."""
    data = {
        "format": _FORMAT,
        "files": [asdict(file) | {"path": str(file.path)} for file in job.files],
        "text_key": job.text_key,
        "min_characters": job.min_characters,
        "seed": job.seed,
        "encoder": hashlib.sha256(repr(asdict(job.encoder)).encode()).hexdigest(),
        "dtype": job.dtype,
        "shard_bytes": shard_bytes(job.files),
    }
    return json.dumps(data, indent=1) + "\n"


class _Pool:
    """Worker processes, a thread of this one for each, and what they share."""

    def __init__(self, job: ShardJob, todo: Iterator[Unit], done: Done) -> None:
        self.job, self.todo, self.done = job, todo, done
        self.lock = threading.Lock()
        self.error: BaseException | None = None

    def serve(self, process: "subprocess.Popen[bytes]") -> None:
        """Feed one process until nothing is left to do, or something went wrong."""
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            pickle.dump(self.job, process.stdin)
            while True:
                with self.lock:
                    unit = next(self.todo, None) if self.error is None else None
                if unit is None:
                    return
                pickle.dump(unit, process.stdin)
                process.stdin.flush()
                answer = pickle.load(process.stdout)
                if isinstance(answer, BaseException):
                    raise answer
                with self.lock:
                    self.done(unit, answer)
        except (EOFError, BrokenPipeError) as error:
            self._failed(process, error)
        except BaseException as error:
            with self.lock:
                self.error = self.error or error

    def _failed(self, process: "subprocess.Popen[bytes]", error: BaseException) -> None:
        status = process.wait()
        lost = DataError(
            f"data: a process that tokenizes ended with status {status}",
            rule="memory for data.workers processes; -9 is the system's, when there is none left",
            remedy="repeat the command with a smaller data.workers; finished shards are kept",
        )
        lost.__cause__ = error
        with self.lock:
            self.error = self.error or lost


def _in_processes(job: ShardJob, workers: int, todo: Iterator[Unit], done: Done) -> None:
    pool = _Pool(job, todo, done)
    processes: list[subprocess.Popen[bytes]] = []
    threads: list[threading.Thread] = []
    try:
        for _ in range(workers):
            process = _spawn()
            processes.append(process)
            threads.append(threading.Thread(target=pool.serve, args=(process,), daemon=True))
            threads[-1].start()
        for thread in threads:
            while thread.is_alive() and pool.error is None:
                thread.join(0.2)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for thread in threads:  # each ends with its process
            thread.join()
        for process in processes:
            _close(process)
    if pool.error is not None:
        raise pool.error


def _close(process: "subprocess.Popen[bytes]") -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # what was not yet read by it
                stream.close()


def _spawn() -> "subprocess.Popen[bytes]":
    package = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH", "")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (package, before))),
        # One thread each: the processes are the parallelism.
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_minitron.data.shard_worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
