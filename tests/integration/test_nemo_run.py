"""NeMo-Run: a recipe from its command line, dry. `test_same_everywhere.py` runs one for real."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo_run", reason="the extra nemo-run is not installed")
pytestmark = pytest.mark.slow
GIVEN = ("model.source=/models/t", "data.sources=[/data/my texts]", "parallel.tensor=2")


def dry_run(folder: Path, *overrides: str) -> list[str]:
    """Lines of `nemorun minitron run recipe=tiny_cpu --dryrun`."""
    given = shlex.join((*GIVEN, *overrides))
    command = [str(Path(sys.executable).with_name("nemorun")), "minitron", "run", "--dryrun", "--yes"]
    environment = os.environ | {"COLUMNS": "1000", "NEMORUN_HOME": str(folder / "home")}
    ended = subprocess.run(
        [*command, "recipe=tiny_cpu", f"overrides={given}", f"folder={folder / 'run'}"],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [line.strip() for line in ended.stdout.splitlines()]


def test_several_nodes_are_a_slurm_job_of_one_task_a_gpu(tmp_path):
    where = ("cluster.nodes=2", "cluster.account=research", "cluster.container_image=nemo.sqsh", "cluster.env={A: b}")
    lines = dry_run(tmp_path, *where)

    assert {
        "#SBATCH --account=research",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --signal=USR1@120",
        "export A=b",
    } <= set(lines)
    [step] = [line for line in lines if line.startswith("srun --output")]
    run = tmp_path / "run"
    mounts = f"{tmp_path}:{tmp_path},{run}:{run},"
    assert f"--container-image nemo.sqsh --container-mounts {mounts}" in step
    assert step.rindex(f"--container-workdir={tmp_path}") > step.index("--container-workdir "), "pyxis takes the last"
    assert step.index("--kill-on-bad-exit=1") < step.index("--kill-on-bad-exit=0"), "Slurm takes the last"
    assert "--container-env=A" in step.replace("--container-env A", "--container-env=A"), "the image's own do not count"
    assert "torchrun" not in step
    assert step.endswith("bash /nemo_run/scripts/tiny.sh")


def test_what_a_cluster_is_asked_for_reaches_slurm(tmp_path):
    where = ("cluster.nodes=2", "cluster.env={http_proxy: 'http://a b;c'}", "cluster.cpus_per_task=7")
    lines = dry_run(tmp_path, *where, "cluster.sbatch=[--exclusive, --mem=0, '--gpu-bind=none']")

    assert {"#SBATCH --exclusive", "#SBATCH --mem=0", "#SBATCH --gpu-bind=none"} <= set(lines)
    assert "#SBATCH --cpus-per-task=7" in lines
    assert "export http_proxy='http://a b;c'" in lines
    [step] = [line for line in lines if line.startswith("srun --output")]
    assert "--cpus-per-task=7" in step
    chdirs = [word for word in step.split() if word.startswith("--chdir")]
    assert chdirs[-1] == f"--chdir={tmp_path}", "relative paths are those of the folder in which it was launched"
