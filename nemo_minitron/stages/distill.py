"""Distil: train the student on the teacher's distribution over the training split."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from nemo_minitron.callbacks.distillation import DistillationMonitor
from nemo_minitron.callbacks.metrics import MetricsLogger
from nemo_minitron.callbacks.progress import ProgressDisplay
from nemo_minitron.callbacks.stopping import SaveAndStop
from nemo_minitron.callbacks.throughput import Throughput
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.megatron.sharded_io import is_whole
from nemo_minitron.models import nemo_settings
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.distillation import MegatronGPTDistillationModel
from nemo_minitron.stages import signals
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.session import make_trainer, restore


def run(context: StageContext) -> dict[str, Any]:
    """Write `student/` and `metrics.jsonl`; returns tokens, speed and the last validation."""
    settings = context.config.distill
    checkpoints = context.out / "checkpoints"
    throughput = Throughput(settings.batch.tokens_per_step)
    monitor = DistillationMonitor()
    trainer = make_trainer(
        context.config,
        [
            throughput,
            monitor,
            _metrics(context),
            ProgressDisplay(context.reporter, context.stage.name),
            *_checkpointing(context, checkpoints),
        ],
        max_steps=settings.steps,
        max_epochs=-1,
        val_check_interval=settings.validate_every or settings.steps + 1,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0,
    )
    model = restore(
        MegatronGPTDistillationModel,
        context.input("student"),
        config=context.config,
        micro_batch_size=settings.batch.micro_batch_size,
        trainer=trainer,
        extra=training_keys(settings, context.input("teacher")),
    )
    data = TokenDataModule(context.input("data"), settings, seed=context.config.seed + context.stage.round - 1)
    resume_from = newest_checkpoint(checkpoints)
    with signals.deferred():
        if resume_from is None:
            trainer.validate(model, datamodule=data, verbose=False)
        trainer.fit(model, datamodule=data, ckpt_path=resume_from)
        if not settings.validate_every or settings.steps % settings.validate_every:
            trainer.validate(model, datamodule=data, verbose=False)
    model.save_to(context.out / "student")
    if context.rank == 0:
        shutil.rmtree(checkpoints, ignore_errors=True)
    last = monitor.history[-1]
    return {
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch.tokens_per_step,
        **throughput.summary(),
        "objective": _objective(settings),
        "validation": last,
        "history": monitor.history,
        "summary": f"KL to the teacher {monitor.history[0]['kl']:.3f} -> {last['kl']:.3f} nats a token",
    }


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps; half-written ones are passed over."""
    whole = [path for path in sorted(folder.glob("*.ckpt")) if is_whole(path)]
    return whole[-1] if whole else None


def _objective(settings: DistillConfig) -> str:
    """The loss in words."""
    parts = {"forward KL over the full vocabulary": settings.kd_weight, "cross-entropy on the text": settings.lm_weight}
    named = {name: weight for name, weight in parts.items() if weight}
    if list(named.values()) == [1.0]:
        return next(iter(named))
    return " + ".join(f"{weight:g} x {name}" for name, weight in named.items())


def _metrics(context: StageContext) -> MetricsLogger:
    settings = context.config.distill
    return MetricsLogger(
        [context.out / "metrics.jsonl", context.run.path / "metrics.jsonl"],
        tensorboard=context.run.path / "tensorboard" / context.stage.name,
        tokens_per_step=settings.batch.tokens_per_step,
        every_n_steps=settings.log_every,
        last_step=settings.steps,
        labels={"stage": context.stage.name},
        reporter=context.reporter,
    )


def _checkpointing(context: StageContext, folder: Path) -> list[Any]:
    stopping = SaveAndStop(
        requested=context.stop_requested, stop=context.stop, folder=folder, take_signals=signals.take
    )
    every = context.config.distill.checkpoint_every
    if not every:
        return [stopping]
    regular = ModelCheckpoint(
        dirpath=folder,
        filename="{step:08d}",
        auto_insert_metric_name=False,
        every_n_train_steps=every,
        save_top_k=1,
        monitor=None,
        save_on_train_epoch_end=False,
    )
    return [regular, stopping]


def training_keys(settings: DistillConfig, teacher: Path) -> dict[str, Any]:
    """The settings as keys of a NeMo model configuration."""
    return {
        "optim": nemo_settings.optimizer_keys(settings.optimizer),
        "minitron": {
            "distillation": {
                "teacher": str(teacher),
                "temperature": settings.temperature,
                "kd_weight": settings.kd_weight,
                "lm_weight": settings.lm_weight,
                "freeze_embeddings": settings.freeze_embeddings,
                "loss_chunk_tokens": settings.loss_chunk_tokens,
                "teacher_precision": settings.teacher_precision
                and nemo_settings.precision_key(settings.teacher_precision),
                "offload_teacher": settings.offload_teacher,
            }
        },
    }
