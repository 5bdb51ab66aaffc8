"""The command line that runs a recipe where the recipe says it is meant to run."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import LayoutError


def run_command(recipe: str, overrides: Sequence[str], run_dir: Path | None, config: RunConfig) -> str:
    """The shell command for a recipe: this machine without `cluster`, torchrun on one node, a batch job on several."""
    cluster = config.cluster
    if cluster is None:
        ranks = config.parallel.model_parallel_size
        line = ["nemo-minitron", *arguments("run", recipe, overrides, run_dir)]
        return shlex.join([*line, "--nproc", str(ranks)] if ranks > 1 else line)
    if cluster.nodes == 1:
        torchrun = ["torchrun", "--standalone", "--nproc-per-node", str(cluster.gpus_per_node), "-m", "nemo_minitron"]
        return shlex.join([*torchrun, *arguments("run", recipe, overrides, run_dir)])
    return shlex.join(["nemo-minitron", *arguments("submit", recipe, overrides, run_dir)])


def check_ranks(ranks: int, parallel: ParallelConfig) -> None:
    """Whether a number of processes holds complete copies of the model.

    Raises:
        LayoutError: It does not.
    """
    needed = parallel.model_parallel_size
    if ranks % needed:
        raise LayoutError(
            f"{ranks} process(es) for parallel.tensor {parallel.tensor} x pipeline {parallel.pipeline} "
            f"x context {parallel.context}",
            rule=f"the number of processes is a multiple of {needed}; what is left over is data parallel",
            remedy=f"--nproc {needed}, other sizes under parallel:, or another cluster.nodes and gpus_per_node",
        )


def arguments(verb: str, recipe: str, overrides: Sequence[str], run_dir: Path | None) -> list[str]:
    """Arguments of `nemo-minitron` for a verb that takes a recipe."""
    folder = [] if run_dir is None else ["--run-dir", str(run_dir)]
    return [verb, recipe, *overrides, *folder]
