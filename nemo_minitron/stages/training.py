"""What every training stage does: train, validate, save so that a stop at any moment costs little, leave the result."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, Trainer

from nemo_minitron.callbacks.garbage import garbage_collection
from nemo_minitron.callbacks.history import BestModel
from nemo_minitron.callbacks.metrics import MetricsLogger
from nemo_minitron.callbacks.progress import ProgressDisplay
from nemo_minitron.callbacks.reporter import duration
from nemo_minitron.callbacks.stopping import SaveAndStop
from nemo_minitron.callbacks.throughput import Throughput
from nemo_minitron.config.training import FinishWith, TrainingConfig
from nemo_minitron.estimate.compute import forward_flops, training_flops
from nemo_minitron.megatron import runtime
from nemo_minitron.models import resume
from nemo_minitron.models.distillation import MegatronGPTDistillationModel
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.models.strategy import MegatronStrategy
from nemo_minitron.stages import budget, signals, speed, trial
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.files import read_json
from nemo_minitron.stages.resume import newest_complete
from nemo_minitron.stages.session import make_trainer, restore, with_run
from nemo_minitron.stages.training_job import TrainingJob


def train(context: StageContext, job: TrainingJob) -> dict[str, Any]:
    """Write the trained model and `metrics.jsonl`; returns steps, tokens, speed and validations. Collective.

    Goes on from the newest complete checkpoint of an earlier attempt. A time budget becomes a number of steps first.
    """
    if job.settings.minutes is not None:
        job = _with_steps_fixed(context, job)
    checkpoints = context.out / "checkpoints"
    resume_from = newest_complete(checkpoints, warn=context.reporter.line)
    if resume_from is not None:
        job = _compared(context, job, resume_from)
    settings = job.settings
    throughput = Throughput(settings.batch.tokens_per_step)
    best = BestModel(
        f"val/{job.metric}",
        folder=checkpoints if settings.finish_with is FinishWith.BEST else None,
        patience=settings.patience,
    )
    trainer = _trainer(context, job, throughput, best, checkpoints)
    model = restore(
        job.kind,
        job.model,
        config=context.config,
        micro_batch_size=settings.batch.micro_batch_size,
        trainer=trainer,
        settings=job.model_settings,
    )
    with signals.deferred():
        if resume_from is None:
            trainer.validate(model, datamodule=job.data, verbose=False)
        trainer.fit(model, datamodule=job.data, ckpt_path=resume_from)
        if _validations(job.monitor.history)[-1]["step"] != trainer.global_step:
            trainer.validate(model, datamodule=job.data, verbose=False)
    _leave(context, model, best, context.out / job.result)
    if context.rank == 0:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        **_budget(context),
        "steps": trainer.global_step,
        "tokens": trainer.global_step * settings.batch.tokens_per_step,
        "skipped_steps": model.guard.skipped,
        "changes": cast(MegatronStrategy, trainer.strategy).changes,
        "ended_early": best.ended,
        "best": {"step": best.step, job.metric: best.value},
        "finished_with": best.step if best.path is not None else trainer.global_step,
        **_speed(model, throughput, settings.batch.sequence_length),
        "validation": _finished_with(job.monitor.history, best),
        "history": job.monitor.history,
    }


def _compared(context: StageContext, job: TrainingJob, checkpoint: Path) -> TrainingJob:
    """The training, compared with what the stopped one had, before the models are read.

    Raises:
        TrainingError: Something was changed that cannot change.
    """
    settings = job.settings
    optimizer = resume.with_states_of(settings.optimizer, checkpoint)
    job = replace(job, settings=settings.model_copy(update={"optimizer": optimizer}))
    told = with_run(job.model_settings, context.config, micro_batch_size=settings.batch.micro_batch_size)
    now = resume.asked(told, steps=settings.steps, data=job.data, student=job.model)
    resume.compare(checkpoint, now, tell=lambda line: None)
    return job


def _with_steps_fixed(context: StageContext, job: TrainingJob) -> TrainingJob:
    """The training with the steps that its budget allows here, or those that an earlier attempt has fixed."""
    started = time.monotonic()
    fixed = runtime.broadcast_object(budget.kept(context.out, job.settings) if context.rank == 0 else None)
    if fixed is None:
        key = context.stage.kind
        given = runtime.broadcast_object(
            budget.Given.of(
                job.settings,
                context.minutes_left,
                key=key,
                trainings=context.config.rounds if key == "distill" else 1,
            )
        )
        if given.notice:
            context.reporter.line(f"          {given.notice}")
        context.reporter.line(f"          {duration(given.seconds)} for {key}: measuring the speed of this machine")
        costs = trial.measure(context, job, seconds=given.seconds)
        left = runtime.broadcast_object(given.seconds - (time.monotonic() - started))
        fixed = budget.fitting(job.settings, costs, given, seconds=left)
        if context.rank == 0:
            budget.keep(context.out, fixed, costs, given)
        context.reporter.line(
            f"          a step takes {costs.step:.3g} s: {fixed.steps:,} steps, {fixed.tokens:,} tokens, "
            f"done in {duration(costs.of(fixed))}"
        )
    return replace(job, settings=fixed, data=job.data.with_settings(fixed))


def _budget(context: StageContext) -> dict[str, Any]:
    """How the number of steps came about, where a time budget was given."""
    path = context.out / budget.FILE
    return {"budget": read_json(path)} if context.rank == 0 and path.is_file() else {}


def _speed(model: MegatronGPTModel, throughput: Throughput, sequence_length: int) -> dict[str, float | None]:
    """Tokens per second, and the fraction of the GPUs' peak that student and teacher together computed at."""
    found = throughput.summary()
    flops = training_flops(model.spec, sequence_length)
    if isinstance(model, MegatronGPTDistillationModel) and (teacher := model.targets.teacher) is not None:
        flops += forward_flops(teacher.spec, sequence_length)
    used = speed.mfu(found["tokens_per_second"], flops, devices=model.runtime.world_size, gpu=speed.gpu_name())
    return {**found, "mfu": used}


def _trainer(
    context: StageContext, job: TrainingJob, throughput: Throughput, best: BestModel, checkpoints: Path
) -> Trainer:
    settings = job.settings
    saving = SaveAndStop(
        requested=context.stop_requested,
        stop=context.stop,
        folder=checkpoints,
        take_signals=signals.take,
        every=settings.checkpoint_interval,
        keep=settings.keep_last,
        best=best,
    )
    callbacks: list[Callback] = [
        throughput,
        job.monitor,
        _metrics(context, settings),
        ProgressDisplay(context.reporter, context.stage.name),
        best,
        saving,
    ]
    callbacks += garbage_collection(context.config.parallel, ranks=context.world_size)
    return make_trainer(
        context.config,
        callbacks,
        async_save=settings.async_save,
        tell=lambda line: context.reporter.line(f"          {line}"),
        max_steps=settings.steps,
        max_epochs=-1,
        val_check_interval=settings.validation_interval,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0,
    )


def _metrics(context: StageContext, settings: TrainingConfig) -> MetricsLogger:
    return MetricsLogger(
        [context.out / "metrics.jsonl", context.run.path / "metrics.jsonl"],
        tensorboard=context.run.path / "tensorboard" / context.stage.name,
        tokens_per_step=settings.batch.tokens_per_step,
        every_n_steps=settings.log_every,
        last_step=settings.steps,
        labels={"stage": context.stage.name},
        reporter=context.reporter,
    )


def _leave(context: StageContext, model: MegatronGPTModel, best: BestModel, target: Path) -> None:
    """Write the result: the model as it is, or the one that did best."""
    if best.path is None:
        model.save_to(target)
        return
    if context.rank == 0 and not target.exists():  # a kill may have come after the move
        best.path.rename(target)
    runtime.barrier()


def _finished_with(history: list[dict[str, Any]], best: BestModel) -> dict[str, Any]:
    """The validation of the weights that were kept."""
    validations = _validations(history)
    if best.path is None:
        return validations[-1]
    return next(row for row in reversed(validations) if row["step"] == best.step)


def _validations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What validations measured; a monitor may also keep what training steps did."""
    return [row for row in history if row["source"] == "val"]
