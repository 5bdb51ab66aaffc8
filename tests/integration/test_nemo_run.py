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
    assert f"--container-image nemo.sqsh --container-mounts {run}:{run}," in step
    assert step.index("--kill-on-bad-exit=1") < step.index("--kill-on-bad-exit=0"), "Slurm takes the last"
    assert "torchrun" not in step
    assert step.endswith("bash /nemo_run/scripts/tiny.sh")
