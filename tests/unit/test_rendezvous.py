"""Ranks that wait for each other: what they say, what ends them, and ports that are taken."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch import distributed as dist

from nemo_minitron.errors import LaunchError, LostRankError
from nemo_minitron.megatron import launched, rendezvous
from nemo_minitron.stages import signals

MINUTE = timedelta(minutes=1)


@pytest.fixture
def place(monkeypatch) -> int:
    """MASTER_ADDR and a free MASTER_PORT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", launched.LISTENER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def _rank(rank: int, world_size: int, output: Path, patience: float) -> None:
    sys.stderr = (output / f"rank{rank}").open("w", encoding="utf-8")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    rendezvous._FIRST_WORD = rendezvous._NEXT_WORD = patience
    status = 0
    try:
        with signals.handled():
            store = rendezvous.meet(rank, world_size, timeout=MINUTE)
            store.add("left", 1)
            while rank == 0 and store.add("left", 0) < world_size:
                time.sleep(0.01)
            time.sleep(0.3)  # rank 0 serves, and may not be gone before the others have its last answer
    except signals.Stopped as stopped:
        status = stopped.exit_status
    os._exit(status)


def start(ranks: list[int], world_size: int, output: Path, *, patience: float = 60) -> list[BaseProcess]:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, world_size, output, patience), daemon=True) for rank in ranks
    ]
    for process in processes:
        process.start()
    return processes


def wait_for(word: str, path: Path) -> str:
    """The line with which a rank says something."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [line for line in lines if word in line and line.endswith("\n")]
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"{path} never says {word}")


def ended(process: BaseProcess) -> int | None:
    process.join(5)
    return process.exitcode


def test_all_ranks_meet_without_a_word(place, tmp_path):
    processes = start([2, 0, 1], 3, tmp_path)
    assert [ended(process) for process in processes] == [0, 0, 0]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["", "", ""]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_those_that_are_missing_are_named_and_one_signal_ends_each_rank(place, tmp_path, number, status):
    processes = start([0, 2], 4, tmp_path, patience=0.5)
    text = wait_for("ranks: 1, 3", tmp_path / "rank0")
    assert re.fullmatch(
        rf"rank 0 has waited \d+ s at 127.0.0.1:{place} for 2 of 4 ranks: 1, 3 \(RANK=0 WORLD_SIZE=4\); "
        r"Ctrl-C ends it\n",
        text,
    )
    for process in reversed(processes):
        os.kill(process.pid or 0, number)
        assert ended(process) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_finds_no_rank_zero_says_so_and_ends_on_a_signal(place, tmp_path, number):
    [process] = start([1], 2, tmp_path, patience=0.5)
    wait_for(f"at 127.0.0.1:{place} for 1 of 2 ranks: 0 (", tmp_path / "rank1")
    os.kill(process.pid or 0, number)
    assert ended(process) == (75 if number == signal.SIGTERM else 130)


def test_a_port_where_somebody_else_listens_without_a_word_ends_on_a_signal_too(place, tmp_path):
    with socket.create_server(("127.0.0.1", place)):
        [process] = start([1], 2, tmp_path, patience=0.5)
        wait_for("for 1 of 2 ranks: 0", tmp_path / "rank1")
        os.kill(process.pid or 0, signal.SIGTERM)
        assert ended(process) == 75


def test_a_taken_port_is_named(place):
    with socket.create_server(("", place)), pytest.raises(LaunchError) as caught:
        rendezvous.meet(0, 2, timeout=MINUTE)
    assert f"MASTER_PORT={place} is taken" in caught.value.what
    assert "set MASTER_PORT to another one" in caught.value.remedy


def test_a_port_that_nproc_holds_cannot_be_taken(place, tmp_path, monkeypatch):
    with socket.socket() as holder, socket.socket() as other:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv(launched.LISTENER, str(os.dup(holder.fileno())))
        processes = start([0], 2, tmp_path)
        holder.close()
        monkeypatch.delenv(launched.LISTENER)
        processes += start([1], 2, tmp_path)
        assert [ended(process) for process in processes] == [0, 0]


def test_missing_ranks_after_the_limit(place, monkeypatch):
    with pytest.raises(LostRankError, match="for 1 of 2 ranks: 1; Ctrl-C"):
        rendezvous.meet(0, 2, timeout=timedelta(seconds=0.2))


@pytest.mark.parametrize(
    ("address", "port"), [("", "29500"), ("node1", ""), ("node1", "http"), ("node1", "0"), ("node1", "70000")]
)
def test_an_address_that_is_none_is_named(address, port, place, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(LaunchError, match=f"MASTER_ADDR='{address}' MASTER_PORT='{port}' for rank 1 of 2"):
        rendezvous.meet(1, 2, timeout=MINUTE)


def test_two_processes_of_one_rank_are_refused():
    store = dist.HashStore()
    rendezvous._arrive(store, 1, 3)
    with pytest.raises(LaunchError, match="two processes are rank 1 of 3"):
        rendezvous._arrive(store, 1, 3)


def test_who_is_missing_is_said_once():
    store = dist.HashStore()
    for rank in (1, 3):
        rendezvous._arrive(store, rank, 5)
    assert rendezvous._missing(store, 1, 5) == [0, 2, 4]
    assert rendezvous._missing(store, 3, 5) == []
