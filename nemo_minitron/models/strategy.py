"""Lightning strategy for Megatron: process groups, optimizer and checkpoints at any TP x PP x DP layout, on CPU or GPU.

Lightning drives the loop; Megatron does forward, backward and the optimizer step inside the model's `training_step`
(manual optimisation). A checkpoint is a folder in Megatron's torch_dist format that any other layout can read.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.trainer import Trainer
from nemo.utils import logging
from torch import Tensor
from torch.optim import Optimizer

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.errors import CheckpointError, MinitronError, TrainingError
from nemo_minitron.megatron import param_gather
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.checkpoint_writer import BackgroundWriter
from nemo_minitron.megatron.optim import TrainOptimizer, Wrapped
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.megatron.sharded_io import load_training, save_training
from nemo_minitron.models import resume
from nemo_minitron.models.best_checkpoints import take_folders
from nemo_minitron.models.gpt import gpt_model
from nemo_minitron.models.optimizer import MegatronOptimizer
from nemo_minitron.models.resume import TrainingRecord

ObjectT = TypeVar("ObjectT")


def strategy_of(trainer: Trainer) -> "MegatronStrategy":
    """The strategy of a trainer that runs a model of ours.

    Raises:
        MinitronError: It is another one.
    """
    if not isinstance(strategy := trainer.strategy, MegatronStrategy):
        raise MinitronError(
            f"the trainer's strategy is {type(strategy).__name__}", remedy="give Trainer(strategy=MegatronStrategy())"
        )
    return strategy


class MegatronStrategy(Strategy):
    """Run a `MegatronGPTModel` under Megatron's parallelism.

    Args:
        parallel: Parallel sizes. None takes them from the model's configuration (NeMo-1 keys).
        seed: Seeds Megatron's random states and any weights that are not loaded.
        async_save: Whether checkpoints are written while training goes on, from a copy in host memory.
        tell: Told, on rank 0, which settings have changed since the checkpoint that training goes on from.

    Processes are started from outside (torchrun, Slurm, the NeMo launcher); one process alone is world size 1.
    Give `Trainer(use_distributed_sampler=False)`: the data module already hands each data-parallel rank its share.
    """

    strategy_name = "megatron"

    def __init__(
        self,
        parallel: ParallelConfig | None = None,
        *,
        seed: int = 1234,
        async_save: bool = False,
        tell: Callable[[str], None] = logging.warning,
    ) -> None:
        super().__init__()
        self.tell = tell
        self.parallel = parallel
        self.seed = seed
        self._background = BackgroundWriter() if async_save else None
        self._runtime: Runtime | None = None
        self._record: TrainingRecord | None = None
        # The runtime finds the process's place. Lightning's own Slurm environment would refuse `--ntasks`, and save and
        # requeue on SIGUSR1 by itself.
        self.cluster_environment = LightningEnvironment()

    # -- environment ---------------------------------------------------------------------------------------------

    @property
    def runtime(self) -> Runtime:
        """The process's place in the layout; started on first use.

        Raises:
            LayoutError: The sizes do not divide the number of processes.
        """
        if self._runtime is None:
            self._runtime = megatron_runtime.start(self.parallel or ParallelConfig(), seed=self.seed)
            rank_zero_only.rank = self._runtime.rank  # type: ignore[attr-defined]  # Lightning keeps it there
        return self._runtime

    def setup_environment(self) -> None:
        """Start the process groups before any module is configured."""
        if self.parallel is None and self.lightning_module is not None:
            self.parallel = gpt_model(self.lightning_module).settings.parallel
        if self.accelerator is not None:
            self.accelerator.setup_device(self.root_device)

    @property
    def root_device(self) -> torch.device:
        """Device of this rank."""
        return self.runtime.device

    @property
    def global_rank(self) -> int:
        """Rank among all processes."""
        return self._runtime.rank if self._runtime else 0

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node."""
        return self._runtime.local_rank if self._runtime else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._runtime.world_size if self._runtime else 1

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the rank that writes logs and small files."""
        return self.global_rank == 0

    # -- set-up and tear-down ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Make the optimizer when fitting; the chunks were built in the model's `configure_model`."""
        if self.accelerator is not None:
            self.accelerator.setup(trainer)
        # On NCCL, but not on Gloo, Lightning validates in inference mode. What layers cache there (rotary tables,
        # sequence lengths) could not be used by the training that follows.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        take_folders(trainer)
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
            self._record = TrainingRecord(self._asked(trainer))

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Leave batches where they are: Megatron's schedule moves each micro-batch when its turn comes."""
        return batch

    def model_to_device(self) -> None:
        """Nothing to do: chunks are built on their device."""

    def teardown(self) -> None:
        """Leave the model where it is: the next trainer may go on with it."""
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.optimizers = []

    # -- collectives Lightning asks for --------------------------------------------------------------------------

    def reduce(self, tensor: Tensor | Any, *args: Any, **kwargs: Any) -> Any:
        """Metrics of our models are global sums already, the same on every rank."""
        return tensor

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank."""
        megatron_runtime.barrier()

    def broadcast(self, obj: ObjectT, src: int = 0) -> ObjectT:
        """Rank 0's object, on every rank."""
        return megatron_runtime.broadcast_object(obj)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Stack a tensor of every rank along a new first dimension."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """One decision for every rank: all of them, or any of them."""
        if all:
            return megatron_runtime.agree(decision)
        return not megatron_runtime.agree(not decision)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Sharded loading needs the chunks and the optimizer to exist."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: weights are written sharded, not through Lightning's dictionary."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Empty: optimizer states are written sharded."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done in `load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done in `load_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write weights, optimizer and Lightning's loop state to a folder, complete or not at all. Collective."""
        # Without Lightning's copy of the configuration and the class it has: neither is plain data.
        common = {
            key: value for key, value in checkpoint.items() if not key.startswith(("hyper_parameters", "hparams_"))
        }
        if self._record is not None:
            common[resume.KEY] = replace(self._record, step=checkpoint["global_step"]).as_plain()
        save_training(
            self._training_chunks(),
            self._megatron_optimizer(),
            Path(filepath),
            common=common,
            background=self._background,
        )

    def finish_saving(self, *, wait: bool) -> Path | None:
        """The asynchronous checkpoint that has become complete since the last call, if one has. Every rank calls it.

        Args:
            wait: Whether to wait for the one that is being written.

        Raises:
            CheckpointError: It could not be written.
        """
        return self._background.finished(wait=wait) if self._background is not None else None

    def on_train_end(self) -> None:
        """What is still being written becomes complete, and the weights are those of the last step."""
        self.finish_saving(wait=True)
        param_gather.disconnect(self._training_chunks())

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """Read back what `save_checkpoint` wrote, at this run's layout; returns Lightning's part.

        What the checkpoint's training had is compared with what is asked of this one first.

        Raises:
            CheckpointError: The folder is not a complete checkpoint of this model.
            TrainingError: Something was changed that cannot change while a training goes on.
        """
        folder = Path(checkpoint_path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder", remedy="give the path of a `.ckpt` folder")
        if self._record is not None:
            self._record = resume.compare(folder, self._record.settings, tell=self._tell)
        return load_training(self._training_chunks(), self._megatron_optimizer(), folder)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint folder (rank 0)."""
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Settings that have changed while this training went on from checkpoints: step, key, and both values."""
        return [] if self._record is None else [dict(change) for change in self._record.changes]

    def _asked(self, trainer: Trainer) -> dict[str, Any]:
        model = gpt_model(self.lightning_module)
        return resume.asked(
            model.settings,
            steps=trainer.max_steps,
            data=getattr(trainer, "datamodule", None),
            student=model.restored_from,
            teacher=model.teacher_path,
            spec=model.spec,
        )

    def _tell(self, line: str) -> None:
        if self.is_global_zero:
            self.tell(line)

    def _training_chunks(self) -> list[Wrapped]:
        return gpt_model(self.lightning_module).training_chunks

    def _megatron_optimizer(self) -> TrainOptimizer:
        for optimizer in self.optimizers:
            if isinstance(optimizer, MegatronOptimizer):
                return optimizer.inner
        raise TrainingError("there is no optimizer yet", rule="training checkpoints are written and read while fitting")
