"""What the stages that run a model share: a Lightning trainer under Megatron, and models read at the run's settings."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, Trainer

from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.run import RunConfig
from nemo_minitron.megatron.data import WindowDataset, loader
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.models.strategy import MegatronStrategy
from nemo_minitron.stages.processes import release_memory

ModelT = TypeVar("ModelT", bound=MegatronGPTModel)


def make_trainer(
    config: RunConfig,
    callbacks: Sequence[Callback] = (),
    *,
    async_save: bool = False,
    tell: Callable[[str], None] | None = None,
    **settings: Any,
) -> Trainer:
    """A Lightning trainer with the run's layout and nothing switched on that writes or prints by itself."""
    told = {} if tell is None else {"tell": tell}
    return Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        strategy=MegatronStrategy(config.parallel, seed=config.seed, async_save=async_save, **told),
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        **settings,
    )


def restore(
    kind: type[ModelT],
    path: Path,
    *,
    config: RunConfig,
    micro_batch_size: int,
    trainer: Trainer,
    settings: ModelSettings | None = None,
) -> ModelT:
    """Read a checkpoint folder as a model of some class, in the run's layout and dtype; earlier ones are freed.

    Of `settings`, what a training adds is taken; layout, dtype, seed and micro-batch size are the run's.
    """
    release_memory()
    told = with_run(settings or ModelSettings(), config, micro_batch_size=micro_batch_size)
    return kind.restore_from(path, settings=told, trainer=trainer)


def with_run(settings: ModelSettings, config: RunConfig, *, micro_batch_size: int) -> ModelSettings:
    """A model's settings with the run's layout, dtype, seed and micro-batch size."""
    run = {"parallel": config.parallel, "precision": config.precision, "seed": config.seed}
    batch = settings.batch.model_copy(update={"micro_batch_size": micro_batch_size})
    return settings.model_copy(update={**run, "batch": batch})


def validate(
    model: MegatronGPTModel, windows: WindowDataset, *, micro_batch_size: int, trainer: Trainer
) -> Mapping[str, float]:
    """Validate over a split's windows, one micro-batch a data-parallel rank at a time; returns the `val/*` means."""
    runtime = model.runtime
    batches = loader(
        windows,
        global_batch_size=micro_batch_size * runtime.dp_size,
        dp_rank=runtime.dp_rank,
        dp_size=runtime.dp_size,
    )
    return trainer.validate(model, dataloaders=batches, verbose=False)[0]
