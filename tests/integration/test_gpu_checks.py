"""`make gpu` on a CPU: every check runs or says why not, and what goes wrong in one is told and stops no other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import result, runner

ROOT = Path(__file__).parents[2]

MADE = '''
import os, time
from benchmarks.gpu.registry import Kind, Outcome, Target, check

@check(order=0, seconds=1)
def wrong(bench):
    """Computes something wrong."""
    missed = Target(name="speed", wanted="at least 2", found=1.0, met=False)
    return Outcome(figure="one is not two", ok=False, figures={"one": 1}, targets=(missed,))

@check(order=1, seconds=1)
def raises(bench):
    """Breaks off."""
    raise ValueError("a reason\\nand more")

@check(order=2, seconds=1, limit=1)
def hangs(bench):
    """Never ends."""
    time.sleep(1000)

@check(order=200, seconds=1)
def dies(bench):
    """Takes its process along."""
    print("last words", flush=True)
    os._exit(7)

@check(order=201, seconds=1)
def last(bench):
    """Runs all the same."""
    return Outcome(figure="here")

@check(order=202, seconds=1, needs=("no_such_library",))
def lacking(bench):
    """Needs what is not there."""
    return Outcome(figure="here")
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "made_checks.py").write_text(MADE)
    (folder / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--module", "made_checks", "--out", str(folder), "--budget", "560"],
        cwd=ROOT,
        env={
            "PYTHONPATH": str(folder),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "TINY": "1",
            "TMPDIR": str(folder / "temporary"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    left = [path.name for path in (folder / "temporary").iterdir() if not path.name.startswith("torchinductor_")]
    assert not left
    (written,) = folder.glob("*-gpu-cpu.json")
    return done, json.loads(written.read_text()), written.with_suffix(".md").read_text()


@pytest.mark.slow
def test_every_check_passes_on_a_cpu_or_says_why_not(run):
    done, found, _ = run
    made = {"wrong", "raises", "hangs", "dies", "last", "lacking"}
    ours = [check for check in found["checks"] if check["name"] not in made]
    assert len(ours) >= 31
    problems = {check["name"]: check for check in ours if check["state"] not in ("passed", "skipped")}
    assert not problems, problems
    skipped = {check["name"]: check["figure"] for check in ours if check["state"] == "skipped"}
    # What a CPU with this project's own libraries cannot show, and no more.
    allowed = {"engine_layers", "teacher_fp8", "fused_kl_and_others", "no_hidden_waits", "demo_bf16", "demo_fp32"}
    allowed |= {"engine_experts", "engine_hybrid", "mamba_kernels_right", "chain_experts", "chain_hybrid"}
    assert skipped.keys() <= allowed
    assert all(skipped.values())
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("ok ", "skipped "))] == [
        check["name"] for check in found["checks"] if check["state"] in ("passed", "skipped")
    ]


@pytest.mark.slow
def test_what_goes_wrong_is_told_and_stops_nothing(run):
    done, found, markdown = run
    assert done.returncode == 1
    by_name = {check["name"]: check for check in found["checks"]}
    states = {name: by_name[name]["state"] for name in ("wrong", "raises", "hangs", "dies", "last", "lacking")}
    assert states == {
        "wrong": "failed",
        "raises": "error",
        "hangs": "error",
        "dies": "error",
        "last": "passed",
        "lacking": "skipped",
    }
    assert by_name["wrong"]["figures"] == {"one": 1}
    assert by_name["raises"]["figure"].startswith("ValueError: a reason (made_checks.py:")
    assert "and more" in by_name["raises"]["traceback"]
    assert by_name["hangs"]["figure"] == "no answer in 4 s"
    assert by_name["dies"]["figure"] == "its process ended with status 7"
    assert "last words" in by_name["dies"]["log"]
    assert by_name["lacking"]["figure"] == "needs no_such_library"
    assert "MISSED: speed 1, wanted at least 2" in done.stdout
    assert "| `wrong` | Computes something wrong | failed | one is not two<br>target speed: 1, wanted" in markdown
    assert found["commit"] in markdown
    assert found["machine"]["versions"]["torch"] in markdown


def test_a_check_for_which_no_time_is_left_is_skipped_and_named():
    check = {"name": "long", "seconds": 50.0, "limit": 100.0}

    def no_start() -> runner.Worker:
        raise AssertionError("nothing is to be started")

    told, worker = runner._one(check, None, no_start, time.monotonic() + 10, tiny=False)
    assert worker is None
    assert told["state"] == "skipped"
    assert told["figure"] in {
        "no time: it takes about 50 s, and 10 s are left",
        "no time: it takes about 50 s, and 9 s are left",
    }


def test_a_result_is_named_after_day_and_card():
    assert result.stem("2026-01-31", "NVIDIA H100 80GB HBM3") == "2026-01-31-gpu-nvidia-h100-80gb-hbm3"
