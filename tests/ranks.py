"""Run a function on several ranks of one machine: gloo, a fresh process each, one thread each.

The processes are forked from a server that has torch, NeMo and Megatron loaded and has never used them, so a rank
starts in well under a second and still knows nothing of what earlier tests did.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = ["torch.distributed", "nemo_minitron.models.distillation"]
"""What the server imports before the first process is forked."""
GRACE_SECONDS = 5.0
"""How long the other ranks may take to report their own failure once one rank has failed."""


class RankError(AssertionError):
    """One or more ranks raised; the text holds their tracebacks."""


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0, interpret: bool = False
) -> list[Any]:
    """Call `function(*args)` on every rank of a new process group; returns what each rank returned, by rank.

    `function` must be importable (defined at module level); arguments and results must be picklable. RANK, WORLD_SIZE,
    LOCAL_RANK and LOCAL_WORLD_SIZE are set as torchrun would. Tensors come back on the CPU as plain copies.
    `interpret` runs Triton's kernels in its interpreter, which has to be asked for before Triton is first imported:
    the processes then start from nothing.

    Raises:
        RankError: A rank raised, died or took too long.
    """
    with started(world_size, function, *args, interpret=interpret) as (_, readers):
        return collect(readers, timeout)


@contextmanager
def started(
    world_size: int, function: Callable[..., Any], *args: Any, interpret: bool = False
) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """The processes of `run_on_ranks`, by rank, and what each one's answer comes through; at the end none is left."""
    context = multiprocessing.get_context("spawn" if interpret else "forkserver")
    if not interpret:
        context.set_forkserver_preload(PRELOAD)
    main = _interpreted_rank_main if interpret else _rank_main
    with tempfile.TemporaryDirectory() as folder:
        job = pickle.dumps((function, args))
        readers: list[Connection] = []
        processes: list[BaseProcess] = []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=main, args=(rank, world_size, str(Path(folder) / "rendezvous"), job, writer), daemon=True
            )
            process.start()
            writer.close()
            readers.append(reader)
            processes.append(process)
        try:
            yield processes, readers
        finally:
            for process in processes:
                process.join(GRACE_SECONDS if process.exitcode is None else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
            for reader in readers:
                reader.close()


def collect(readers: list[Connection], timeout: float) -> list[Any]:
    """What each rank returned.

    Raises:
        RankError: A rank raised, died or took too long.
    """
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    waiting = dict(enumerate(readers))
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready = wait(list(waiting.values()), timeout=left)
        for rank in [rank for rank, reader in waiting.items() if reader in ready]:
            try:
                worked, payload = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                worked, payload = False, "the process died without a word"
            if worked:
                results[rank] = payload
            else:
                failures[rank] = payload
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise RankError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(failures.items())))
    if waiting:
        raise RankError(f"no answer from rank(s) {sorted(waiting)} within {timeout:.0f} s")
    return [results[rank] for rank in range(len(readers))]


def _interpreted_rank_main(*args: Any) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    _rank_main(*args)


def _rank_main(rank: int, world_size: int, rendezvous: str, job: bytes, writer: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        function, args = pickle.loads(job)
        answer = pickle.dumps((True, function(*args)))
    except BaseException:  # whatever it is, the parent must hear of it
        answer = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(answer)
    writer.close()
    if distributed.is_initialized():
        distributed.destroy_process_group()
