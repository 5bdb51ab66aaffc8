"""Starting several ranks: their environment, their errors, their signals, and that none is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import sys
from pathlib import Path
from nemo_minitron.cli import launch
module = Path(sys.argv[1])
launch.sys.executable = str(module / "python")
sys.exit(launch.start(["x"], ranks=3, run=module / "run"))
"""


@pytest.fixture
def start(tmp_path):
    """Starts three ranks of a given program in place of `python -m nemo_minitron`."""

    def begin(program: str) -> "subprocess.Popen[str]":
        (tmp_path / "program.py").write_text(textwrap.dedent(program))
        (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/program.py {tmp_path}\n")
        (tmp_path / "python").chmod(0o755)
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return begin


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def test_every_rank_knows_its_place_and_rank_zero_owns_the_output(start, tmp_path):
    status, out, err = finish(
        start(
            """
            import os, sys
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
            open(sys.argv[1] + "/rank" + os.environ["RANK"], "w").write(" ".join(os.environ[name] for name in names))
            print("said by", os.environ["RANK"]); print("complained", os.environ["RANK"], file=sys.stderr)
            """
        )
    )
    assert status == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(3)] == [f"{r} {r} 3 127.0.0.1" for r in range(3)]
    assert out == "said by 0\n"
    assert err == "complained 0\n"


def test_rank_zero_alone_is_handed_the_port_before_anybody_can_take_it(start, tmp_path):
    status, _, _ = finish(
        start(
            """
            import os, socket, sys
            number = os.environ.get("NEMO_MINITRON_LISTENER")
            bound = socket.socket(fileno=int(number)).getsockname() == ("127.0.0.1", int(os.environ["MASTER_PORT"])) \\
                if number else None
            open(sys.argv[1] + "/rank" + os.environ["RANK"], "w").write(str(bound))
            """
        )
    )
    assert status == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(3)] == ["True", "None", "None"]


def test_an_error_of_all_ranks_is_shown_once(start):
    status, _, err = finish(
        start(
            """
            import os, sys
            print("error: bad key", file=sys.stderr); sys.exit(2)
            """
        )
    )
    assert status == 2
    assert err == "error: bad key\n"


def test_an_error_of_one_rank_is_shown_and_ends_the_others(start):
    began = time.monotonic()
    status, _, err = finish(
        start(
            """
            import os, sys, time
            if os.environ["RANK"] == "2":
                print("rank 2: out of memory", file=sys.stderr); sys.exit(1)
            time.sleep(60)
            """
        )
    )
    assert status == 1
    assert err == "rank 2: out of memory\n"
    assert time.monotonic() - began < 20


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_every_rank(start, tmp_path, number):
    process = start(
        """
        import os, signal, sys, time
        from pathlib import Path
        rank, folder = os.environ["RANK"], Path(sys.argv[1])
        def stop(number, frame):
            (folder / ("saved" + rank)).touch()
            sys.exit(128 + number)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, stop)
        (folder / ("ready" + rank)).touch()
        time.sleep(60)
        """
    )
    for rank in range(3):
        wait_for(tmp_path / f"ready{rank}")
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 128 + number
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(3))
    assert err == ""


@pytest.mark.parametrize("lost", [0, 2])
def test_a_rank_that_is_killed_ends_the_others_and_is_named(start, tmp_path, lost):
    checkpoint = tmp_path / "run/stages/.distill.partial/checkpoints/00000030.ckpt"
    checkpoint.mkdir(parents=True)
    (checkpoint / "SHA256SUMS").touch()
    (checkpoint.parent / "00000040.ckpt").mkdir()  # not finished
    began = time.monotonic()
    status, _, err = finish(
        start(
            f"""
            import os, signal, sys, time
            if os.environ["RANK"] == "{lost}":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
            """
        )
    )
    assert status == 137
    assert err == (
        f"error: rank {lost} was ended by SIGKILL, as the system does when memory runs out\n"
        f"  newest complete checkpoint: {checkpoint} (step 30); the same command goes on from there\n"
    )
    assert time.monotonic() - began < 25


def test_ranks_that_have_saved_are_to_be_run_again(start):
    """Status 75, although the rank that ended last had lost the others by then."""
    status, _, err = finish(
        start(
            """
            import os, sys, time
            time.sleep(float(os.environ["RANK"]))
            sys.exit(75 if os.environ["RANK"] == "0" else 1)
            """
        )
    )
    assert (status, err) == (75, "")


def test_a_signal_before_ranks_can_take_it_is_no_failure(start, tmp_path):
    process = start(
        """
        import os, sys, time
        from pathlib import Path
        (Path(sys.argv[1]) / ("ready" + os.environ["RANK"])).touch()
        time.sleep(60)
        """
    )
    for rank in range(3):
        wait_for(tmp_path / f"ready{rank}")
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert (status, err) == (75, "")


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends orphans on Linux only")
def test_no_rank_and_no_file_outlives_a_killed_launcher(start, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    process = start(
        """
        import os, sys, time
        from pathlib import Path
        path = Path(sys.argv[1]) / ("pid" + os.environ["RANK"])
        path.with_suffix(".tmp").write_text(str(os.getpid()))
        path.with_suffix(".tmp").rename(path)
        time.sleep(60)
        """
    )
    for rank in range(3):
        wait_for(tmp_path / f"pid{rank}")
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(3)]
    process.kill()
    finish(process)
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
    assert not list((tmp_path / "temporary").iterdir())


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_threads_are_shared_out_unless_the_user_said(start, monkeypatch):
    program = """
        import os
        print(os.environ["OMP_NUM_THREADS"])
        """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert finish(start(program))[1] == f"{max(1, len(os.sched_getaffinity(0)) // 3)}\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert finish(start(program))[1] == "7\n"
