"""Which launcher has started a process, told by stand-ins for the environments of Slurm and torchrun."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_minitron.cli import job, launch
from nemo_minitron.cli.main import app
from nemo_minitron.errors import LaunchError
from nemo_minitron.megatron import launched

RECIPE = str(Path(__file__).parents[2] / "recipes/tiny/tiny_cpu.yaml")
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "dev", "SLURM_NTASKS": "2"}
TASK = JOB | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
SHELL = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
"""What the first node's shell has, whoever opened it."""
ALONE = (0, 1)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def put(monkeypatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        pytest.param({}, ALONE, id="nothing"),
        pytest.param({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4), id="torchrun"),
        pytest.param(TASK | {"RANK": "0", "WORLD_SIZE": "8"}, (0, 8), id="torchrun in a task"),
        pytest.param(TASK, (1, 2), id="srun"),
        pytest.param(TASK | {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "3"}, (1, 2), id="srun in salloc"),
        pytest.param(TASK | {"SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "1"}, (1, 2), id="srun in a job named bash"),
        pytest.param(TASK | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2), id="step of a larger job"),
        pytest.param(JOB, ALONE, id="salloc on the login node"),
        pytest.param(SHELL, ALONE, id="no step id"),
        pytest.param(SHELL | {"SLURM_STEP_ID": str(2**32 - 6)}, ALONE, id="interactive step"),
        pytest.param(SHELL | {"SLURM_STEP_ID": str(2**32 - 5)}, ALONE, id="batch step"),
        pytest.param(SHELL | {"SLURM_STEP_ID": str(2**32 - 2)}, ALONE, id="batch step before Slurm 20.11"),
    ],
)
def test_place_by_the_environment(variables, place, monkeypatch):
    put(monkeypatch, variables)
    found = launched.find()
    assert (found.rank, found.world_size) == place


@pytest.mark.parametrize("terminal", [True, False])
def test_the_shell_of_srun_pty_is_told_by_its_terminal(terminal, monkeypatch):
    put(monkeypatch, SHELL | {"SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "40123"})
    monkeypatch.setattr(os, "isatty", lambda file: terminal and file == 0)
    assert launched.find().world_size == (1 if terminal else 2)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 WORLD_SIZE=0"),
        (TASK | {"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID='batch'"),
    ],
)
def test_what_makes_no_sense_is_named(variables, told, monkeypatch):
    put(monkeypatch, variables)
    with pytest.raises(LaunchError) as caught:
        launched.find()
    assert told in caught.value.what
    assert "unset" in caught.value.remedy


@pytest.fixture
def begun(monkeypatch):
    """What a command comes to: "here", or the number of ranks that it would start."""
    found: list[object] = []
    monkeypatch.setattr(job, "_run_here", lambda *unused: found.append("here"))
    monkeypatch.setattr(launch, "start", lambda arguments, ranks, run: found.append(ranks) or 0)
    monkeypatch.setattr(job.quiet, "install", lambda: None)
    monkeypatch.setattr(job.threads, "choose", lambda: None)
    return found


def command(*options: str):
    return CliRunner().invoke(app, ["run", RECIPE, "model.source=m", "data.sources=[t]", *options])


@pytest.mark.parametrize(
    ("variables", "nproc", "values"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, 4, "RANK=0 WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 1, "RANK=0 WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 2, "RANK=0 WORLD_SIZE=1"),
        (TASK, 4, "SLURM_PROCID=1 SLURM_NTASKS=2"),
        (TASK, 1, "SLURM_PROCID=1 SLURM_NTASKS=2"),
    ],
)
def test_nproc_against_a_launcher_is_refused(variables, nproc, values, begun, monkeypatch):
    put(monkeypatch, variables)
    ended = command("--nproc", str(nproc))
    assert ended.exit_code == 2
    assert f"--nproc {nproc}, " in ended.stderr
    assert values in ended.stderr
    assert "leave --nproc out" in ended.stderr
    assert begun == []


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({}, ["--nproc", "2"], 2),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["--nproc", "2"], "here"),
        (TASK, [], "here"),
        (TASK | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, ["--nproc", "2"], 2),
        (SHELL, ["--nproc", "4"], 4),
        (SHELL, ["parallel.tensor=2"], 2),
    ],
)
def test_what_does_not_contradict_is_followed(variables, options, expected, begun, monkeypatch):
    put(monkeypatch, variables)
    ended = command(*options)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert begun == [expected]


@pytest.mark.parametrize("given", [{"RANK": "1"}, {"WORLD_SIZE": "4"}])
def test_half_of_a_launcher_is_refused(given, begun, monkeypatch):
    put(monkeypatch, given)
    ended = command()
    [(name, value)] = given.items()
    assert ended.exit_code == 2
    assert f"{name}={value} is set" in ended.stderr
    assert f"unset {name}" in ended.stderr
    assert begun == []


def test_an_interactive_allocation_runs_one_process_and_says_what_to_type(begun, monkeypatch):
    put(monkeypatch, SHELL | {"SLURM_STEP_ID": str(2**32 - 6)})
    ended = command()
    assert ended.exit_code == 0
    assert begun == ["here"]
    assert "job 7 of 2 tasks" in ended.stderr
    assert "1 process(es) run here; for 2 ranks put `srun` before the command" in ended.stderr


@pytest.mark.parametrize(
    ("gpus", "options", "said"),
    [
        ("0,1,2,3", [], "1 process(es) for 4 visible GPUs; --nproc 4 uses 4 of them\n"),
        ("0,1,2", ["parallel.tensor=2"], ""),
        ("0,1,2,3,4", ["parallel.tensor=2"], "2 process(es) for 5 visible GPUs; --nproc 4 uses 4 of them\n"),
        ("0,1,2,3", ["--nproc", "1"], ""),
        ("0", [], ""),
        ("-1", [], ""),
    ],
)
def test_gpus_that_no_process_would_use_are_told(gpus, options, said, begun, monkeypatch):
    put(monkeypatch, {"CUDA_VISIBLE_DEVICES": gpus})
    ended = command(*options)
    assert (ended.exit_code, ended.stderr) == (0, said)


def test_gpus_are_counted_by_their_device_files(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    names = ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps")
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / name for name in names])
    assert launched.visible_gpus() == 3


def test_variables_that_make_no_sense_end_the_command_with_a_message(begun, monkeypatch):
    put(monkeypatch, {"RANK": "zero", "WORLD_SIZE": "2"})
    ended = command()
    assert ended.exit_code == 2
    assert "RANK='zero'" in ended.stderr
    assert "defect" not in ended.stderr
