import os
import subprocess
import sys
import time

import psutil
import pytest

from nemo_minitron.cli import threads


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Writes control groups; the argument is what `/proc/self/cgroup` says, files come by name."""
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)

    def write(own, **files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_without_a_quota_it_is_the_cores_that_the_process_may_run_on(cgroups):
    assert threads.usable_cores() == 8
    cgroups("0::/job\n", **{"job/cpu.max": "max 100000\n"})
    assert threads.usable_cores() == 8


@pytest.mark.parametrize(("quota", "cores"), [("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)])
def test_a_quota_counts_in_whole_cores(quota, cores, cgroups):
    cgroups("0::/job\n", **{"job/cpu.max": quota})
    assert threads.usable_cores() == cores


def test_the_tightest_group_around_counts(cgroups):
    cgroups("0::/pod/job\n", **{"pod/cpu.max": "300000 100000", "pod/job/cpu.max": "max 100000"})
    assert threads.usable_cores() == 3


def test_the_first_version_of_control_groups(cgroups):
    files = {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}
    cgroups("5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n", **files)
    assert threads.usable_cores() == 4
    cgroups("4:cpu,cpuacct:/docker/1\n", **{**files, "cpu/cpu.cfs_quota_us": "-1\n"})
    assert threads.usable_cores() == 8


def test_what_the_user_has_set_stays(cgroups):
    chosen = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "active"}
    threads.choose(environment=chosen)
    assert chosen == {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "active"}
    chosen = {"GOMP_SPINCOUNT": "1000"}
    threads.choose(environment=chosen)
    assert chosen == {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "1000"}


def _others_use(monkeypatch, cores, *, of):
    """What `psutil` says of a machine on which other programs keep some cores busy."""
    monkeypatch.setattr(psutil, "cpu_count", lambda: of)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100 * cores / of)


def test_ranks_of_one_machine_share_its_cores(cgroups, monkeypatch):
    _others_use(monkeypatch, 4, of=8)
    for ranks, share in ((1, "8"), (3, "2"), (16, "1")):
        chosen = {}
        threads.choose(ranks=ranks, environment=chosen)
        assert chosen == {"OMP_NUM_THREADS": share, "OMP_WAIT_POLICY": "passive"}


SPINNING = {"GOMP_SPINCOUNT": "4000", "KMP_BLOCKTIME": "1"}
SLEEPING = {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(
    ("used", "ranks", "of", "expected"),
    [
        (0.0, 1, 8, SPINNING),
        (0.2, 1, 8, SPINNING),  # there is always something
        (0.5, 1, 8, SLEEPING),
        (7.9, 1, 16, SPINNING),  # eight threads in a control group, on a machine of 16
        (8.5, 1, 16, SLEEPING),
        (0.5, 3, 8, SPINNING),  # three times two threads
        (2.5, 3, 8, SLEEPING),
        (0.0, 8, 8, SLEEPING),  # one thread waits for nobody
    ],
)
@pytest.mark.usefixtures("cgroups")
def test_threads_spin_for_a_moment_where_each_has_a_core(used, ranks, of, expected, monkeypatch):
    _others_use(monkeypatch, used, of=of)
    chosen = {}
    threads.choose(ranks=ranks, environment=chosen)
    assert chosen.pop("OMP_NUM_THREADS") == str(8 // ranks)
    assert chosen == expected


def test_a_program_that_never_rests_is_seen():
    cores = psutil.cpu_count()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        time.sleep(0.5)
        assert not threads.is_idle(threads=cores)
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_command_chooses_before_torch_is_loaded():
    code = """
import os, sys
from nemo_minitron.cli import job
is_chosen = lambda: bool({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys())
job._run_here = lambda *unused: print(is_chosen(), "torch" in sys.modules)
job.run(job.Job(recipe="smollm2/demo", overrides=[]))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
