"""Slurm: the batch file of a recipe, and its submission.

One task a GPU; a task finds its rank in Slurm's variables, so nothing starts processes in between. Before the time
limit Slurm signals the tasks, training saves, and the job queues itself again.
"""

import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.config.cluster import ClusterConfig
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import ConfigError, LaunchError
from nemo_minitron.launchers.commands import arguments, check_ranks
from nemo_minitron.stages.files import write_text
from nemo_minitron.stages.signals import RUN_AGAIN

_WARNING = signal.SIGUSR1
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Where ranks meet."""
_GRACE = 60
"""Seconds that the other tasks have when one has ended."""


def batch_script(recipe: str, overrides: Sequence[str], run_dir: Path, config: RunConfig) -> str:
    """What `sbatch` is given.

    Relative paths hold from the folder in which the job is submitted; all nodes see `run_dir`.

    Raises:
        ConfigError: The recipe does not say where it is meant to run.
        LayoutError: The GPUs do not fit the layout.
    """
    cluster = config.cluster
    if cluster is None:
        raise ConfigError(recipe, ["cluster: is missing; `cluster.nodes=4` is the least that a batch job needs"])
    check_ranks(cluster.gpus, config.parallel)
    options = [f"#SBATCH {shlex.quote(option)}" for option in _options(config.name, run_dir, cluster)]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    command = shlex.join(["nemo-minitron", *arguments("run", recipe, overrides, run_dir)])
    return "\n".join(
        [
            "#!/bin/bash",
            *options,
            "",
            *exports,
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_PORT=$((15000 + SLURM_JOB_ID % 20000))",
            "",
            f"srun {' '.join(_step_options(run_dir, cluster))} \\",
            f"  {command}",
            "status=$?",
            "",
            f"# {RUN_AGAIN}: every rank was warned and has saved. Any other status ends the job.",
            f'if [ "$status" -eq {RUN_AGAIN} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$status"',
            "",
        ]
    )


def _options(name: str, run_dir: Path, cluster: ClusterConfig) -> list[str]:
    return [
        f"--job-name={name}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.gpus_per_node}",
        f"--gpus-per-node={cluster.gpus_per_node}",
        f"--time={cluster.time}",
        f"--signal={_WARNING.name.removeprefix('SIG')}@{cluster.warn_seconds}",
        "--requeue",
        f"--output={run_dir}/slurm-%j.out",
        "--open-mode=append",
        *cpus_option(cluster),
        *([f"--account={cluster.account}"] if cluster.account else []),
        *([f"--partition={cluster.partition}"] if cluster.partition else []),
        *cluster.sbatch,
    ]


def _step_options(run_dir: Path, cluster: ClusterConfig) -> list[str]:
    """Of `srun`. The first task that ends must not take the others along before they have saved."""
    options = ["--kill-on-bad-exit=0", f"--wait={_GRACE}", *cpus_option(cluster)]
    if cluster.container_image:
        shown = [f"{run_dir}:{run_dir}"] if run_dir.is_absolute() else []
        mounts = ",".join(['"$PWD:$PWD"', *(shlex.quote(mount) for mount in (*shown, *cluster.container_mounts))])
        options += [
            f"--container-image={shlex.quote(cluster.container_image)}",
            f"--container-mounts={mounts}",
            '--container-workdir="$PWD"',
            # Without it, variables of the image take the place of those of the job.
            f"--container-env={','.join((*_MEETING, *cluster.env))}",
        ]
    return options


def cpus_option(cluster: ClusterConfig) -> list[str]:
    """Cores of each rank, as `sbatch` and `srun` take it."""
    return [] if cluster.cpus_per_task is None else [f"--cpus-per-task={cluster.cpus_per_task}"]


def submit(script: str, run_dir: Path) -> str:
    """Write the batch file into the run folder and queue it; returns what Slurm says.

    Raises:
        LaunchError: There is no Slurm here, or it refuses the job.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "job.sbatch"
    write_text(path, script)
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LaunchError(
            f"there is no sbatch here; the batch file is {path}",
            remedy="submit from a machine of the cluster, or run the recipe here with `nemo-minitron run`",
        ) from error
    if done.returncode:
        raise LaunchError(f"sbatch {path} ended with status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout
