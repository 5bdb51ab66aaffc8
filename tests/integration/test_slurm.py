"""The Slurm batch file: its text, its shell syntax, and two tasks that are warned, queued again, and finish."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_minitron.cli.main import app
from nemo_minitron.config.load import load_recipe
from nemo_minitron.errors import ConfigError, LayoutError
from nemo_minitron.launchers.slurm import batch_script
from tests import fake_slurm
from tests.tiny import write_corpus, write_llama

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/tiny/tiny_cpu.yaml"
GIVEN = ("model.source=m", "data.sources=[t]")


def script(*overrides: str, run_dir: Path = Path("runs/mine")) -> str:
    given = [*GIVEN, *overrides]
    return batch_script("my.yaml", given, run_dir, load_recipe(RECIPE, given))


def test_the_template_is_what_submit_writes():
    """Made by `nemo-minitron submit my.yaml cluster.nodes=4 --run-dir runs/mine --print`."""
    config = load_recipe(RECIPE, [*GIVEN, "cluster.nodes=4", "name=mine"])

    assert batch_script("my.yaml", [], Path("runs/mine"), config) == (ROOT / "examples/slurm.sub").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.nodes=4"],
        ["cluster.container_image=/images/my image.sqsh", "cluster.container_mounts=[/lustre:/data:ro]"],
        ['cluster.env={GREETING: "it\'s $HOME"}', "cluster.sbatch=[--comment=two words]"],
    ],
)
def test_bash_reads_it(overrides, tmp_path):
    path = tmp_path / "job"
    path.write_text(script(*overrides))

    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode == 0


def test_container_sees_the_folder_of_the_job_and_of_the_run():
    text = script(
        "cluster.container_image=nvcr.io#nvidia/nemo:25.07",
        "cluster.container_mounts=[/lustre:/data:ro]",
        run_dir=Path("/scratch/mine"),
    )

    [step] = [line for line in text.splitlines() if line.startswith("srun")]
    words = shlex.split(step.removesuffix("\\"))
    assert "--container-image=nvcr.io#nvidia/nemo:25.07" in words
    assert "--container-mounts=$PWD:$PWD,/scratch/mine:/scratch/mine,/lustre:/data:ro" in words
    assert "--container-workdir=$PWD" in words
    assert "--container-env=MASTER_ADDR,MASTER_PORT" in words
    text = script("cluster.container_image=x", "cluster.env={NCCL_IB_HCA: mlx5, A: b}")
    assert " --container-env=MASTER_ADDR,MASTER_PORT,NCCL_IB_HCA,A " in text, "the image's own do not count"


def test_cores_of_a_rank_are_asked_of_the_job_and_of_the_step():
    lines = script("cluster.cpus_per_task=14").splitlines()
    assert "#SBATCH --cpus-per-task=14" in lines
    assert [line for line in lines if line.startswith("srun") and " --cpus-per-task=14 " in line]


def test_variables_reach_the_ranks_as_they_are_written():
    [line] = [line for line in script('cluster.env={A: "it\'s $HOME"}').splitlines() if line.startswith("export A=")]
    shown = subprocess.run(["bash", "-c", f'{line}; printf %s "$A"'], capture_output=True, text=True, check=True)

    assert shown.stdout == "it's $HOME"


def test_refused_before_it_is_queued():
    with pytest.raises(ConfigError, match=r"cluster: is missing"):
        script()
    with pytest.raises(LayoutError, match=r"8 process\(es\) for parallel.tensor 3"):
        script("cluster.nodes=1", "parallel.tensor=3")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=60)
    write_corpus(folder / "corpus")
    return [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]"]


def test_without_slurm_the_file_is_named(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    ended = CliRunner().invoke(app, ["submit", str(RECIPE), *inputs, "cluster.gpus_per_node=2", "--run-dir", str(run)])

    assert ended.exit_code == 2
    assert f"there is no sbatch here; the batch file is {run / 'job.sbatch'}" in ended.stderr
    assert (run / "job.sbatch").read_text().startswith("#!/bin/bash")


@pytest.mark.slow
def test_two_tasks_are_warned_save_and_go_on_in_the_same_job(inputs, tmp_path):
    fake_slurm.install(tmp_path / "bin")
    run, log = tmp_path / "run", tmp_path / "slurm.log"
    log.touch()
    given = [str(RECIPE), *inputs, "parallel.tensor=2", "cluster.gpus_per_node=2", "cluster.env={OMP_NUM_THREADS: '1'}"]
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FAKE_SLURM_LOG": str(log),
        "FAKE_SLURM_WARN_AFTER": f"{run / 'metrics.jsonl'}:6",
    }
    ended = subprocess.run(
        ["nemo-minitron", "submit", *given, "--run-dir", str(run)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    output = (run / "slurm-77.out").read_text()
    assert ended.returncode == 0, ended.stderr + output
    assert ended.stdout == "Submitted batch job 77\n"
    step = "srun --kill-on-bad-exit=0 --wait=60"
    assert log.read_text().splitlines() == [step, "scontrol requeue 77", step]
    assert "stopped by SIGUSR1" in output
    assert "2 ranks" in output, output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 21)), "each step once"
    assert (run / "report.html").is_file()
