"""Where a recipe is meant to run: what a scheduler is asked for, and what a dry run reckons with."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from nemo_minitron.config.base import Count, Section


class Gpu(StrEnum):
    """GPUs whose peak and memory are known (`nemo_minitron.estimate`)."""

    A100 = "a100"
    H100 = "h100"
    H200 = "h200"
    B200 = "b200"


class ClusterConfig(Section):
    """Nodes, GPUs and the scheduler's words. Changes nothing in what is computed."""

    nodes: Count = 1
    gpus_per_node: Count = 8
    """One rank runs on each."""
    gpu: Gpu = Gpu.H100
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the GPU's dense bf16 peak that a stage is taken to reach while it computes."""
    time: str = Field(default="04:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
    """Time limit of one job, [days-]hours:minutes:seconds. Training saves before it ends, and is queued again."""
    warn_seconds: Count = 120
    """How long before the time limit that is: more than a step and a save take."""
    account: str | None = None
    partition: str | None = None
    cpus_per_task: Count | None = None
    """Cores of each rank, told to `sbatch` and to `srun`, which since Slurm 22.05 does not take it over. None asks for
    nothing, which some clusters take for one core."""
    sbatch: tuple[str, ...] = ()
    """Further options of `sbatch`, as `--exclusive` or `--mem=0`."""
    container_image: str | None = None
    """For pyxis (`srun --container-image`); None runs in the environment of the job."""
    container_mounts: tuple[str, ...] = ()
    """`host:container[:flags]`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank, in a container too."""

    @property
    def gpus(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.gpus_per_node
