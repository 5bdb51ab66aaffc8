"""NeMo-Run: a recipe as an experiment, on this machine or under Slurm. Needs the extra `nemo-run`.

The experiment is one script, the command line that a user would type: what a stage needs lies in the run folder, so no
function is pickled. (NeMo-Run's torchrun quotes arguments for a shell that it does not start.)
`nemo_minitron.cli.nemorun` makes it a command of `nemorun`.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import nemo_run

from nemo_minitron.config.cluster import ClusterConfig
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import LaunchError
from nemo_minitron.launchers.commands import arguments, check_ranks, run_command
from nemo_minitron.launchers.slurm import cpus_option


def experiment(recipe: str, overrides: Sequence[str], run_dir: Path, config: RunConfig) -> nemo_run.Experiment:
    """An experiment that runs a recipe as its section `cluster` says: on several nodes under Slurm, else here.

    `run_dir` is an absolute path on a disk that all nodes see.

    Raises:
        LayoutError: The GPUs do not fit the layout.
    """
    cluster = config.cluster
    if cluster is None or cluster.nodes == 1:
        command, executor = run_command(recipe, overrides, run_dir, config), nemo_run.LocalExecutor()
    else:
        check_ranks(cluster.gpus, config.parallel)
        # In the shell's place, so that Slurm's signals reach the rank.
        command = shlex.join(["exec", "nemo-minitron", *arguments("run", recipe, overrides, run_dir)])
        executor = _slurm(cluster, run_dir)
    found = nemo_run.Experiment(config.name)
    with found:
        found.add(nemo_run.Script(inline=command), executor=executor, name=config.name)
    return found


def _slurm(cluster: ClusterConfig, run_dir: Path) -> nemo_run.SlurmExecutor:
    """One task a GPU, without torchrun. The package comes with the container or the environment: nothing is packed."""
    here = Path.cwd()
    # Relative paths of a recipe are those of the folder in which it was launched.
    place = [f"--container-workdir={here}"] if cluster.container_image else [f"--chdir={here}"]
    return nemo_run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.gpus_per_node,
        gpus_per_node=cluster.gpus_per_node,
        time=cluster.time,
        container_image=cluster.container_image,
        container_mounts=[f"{here}:{here}", f"{run_dir}:{run_dir}", *cluster.container_mounts],
        container_env=list(cluster.env),
        cpus_per_task=cluster.cpus_per_task,
        # NeMo-Run's own way writes names in capitals and values without quotes.
        setup_lines="\n".join(f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()),
        srun_args=["--kill-on-bad-exit=0", *cpus_option(cluster), *place],
        additional_parameters={"signal": f"USR1@{cluster.warn_seconds}", **_further(cluster)},
        job_name_prefix="minitron-",  # its own is made of the account, which need not be given
        tunnel=nemo_run.LocalTunnel(job_dir=str(run_dir / "nemo_run")),
        packager=nemo_run.Packager(),
    )


def _further(cluster: ClusterConfig) -> dict[str, str | bool]:
    """`cluster.sbatch` as NeMo-Run takes further options: by names without dashes, True for a bare one.

    Raises:
        LaunchError: One is not of the form `--name` or `--name=value`.
    """
    found: dict[str, str | bool] = {}
    for option in cluster.sbatch:
        name, equals, value = option.partition("=")
        if not name.startswith("--") or " " in name:
            raise LaunchError(
                f"cluster.sbatch: {option}",
                rule="NeMo-Run takes options written as --name or --name=value",
                remedy="write it so",
            )
        found[name.removeprefix("--").replace("-", "_")] = value if equals else True
    return found
