"""Score: importance of every layer, channel, neuron and head, from one forward pass over calibration text.

With `score.depth.metrics` it also measures what the model loses without its layers, and with `target.merge_layers` what
those that will go add to the residual stream. What is summed up is saved every
`score.checkpoint_every` samples, and on a signal, so that a run that was cut off goes on from there, at any layout.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_minitron.callbacks.importance import ImportanceCallback, ScoreCheckpointing
from nemo_minitron.callbacks.progress import ProgressDisplay
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.run import RunConfig, ScoreConfig
from nemo_minitron.estimate.compute import forward_flops
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.models.gpt import MegatronGPTModel, per_token
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.coverage import Coverage
from nemo_minitron.pruning.depth import DepthScores
from nemo_minitron.pruning.merge import check_mergeable
from nemo_minitron.pruning.partial import PartialScores
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.stages import signals, speed
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.depth import measure_depth
from nemo_minitron.stages.merge import measure_merge
from nemo_minitron.stages.prune import MERGE_FILE, target_of
from nemo_minitron.stages.session import make_trainer, restore, validate
from nemo_minitron.stages.sublayers import sublayer_losses

FILE, PARTIAL, DEPTH_PARTIAL = "scores.safetensors", "partial.safetensors", "depth_partial.safetensors"


def run(context: StageContext) -> dict[str, Any]:
    """Write `scores.safetensors`; returns how much text they rest on."""
    config, info = context.config, context.run.result("data")
    settings = config.score
    if config.target.merge_layers:
        check_mergeable(open_checkpoint(context.input("model")).spec)
    windows = calibration_windows(context.input("data"), config)
    coverage = Coverage.of(info["data_digest"], settings.sequence_length, settings.first_sample, len(windows))
    identity = _identity(coverage, settings)
    before = PartialScores.load(context.out / PARTIAL, identity)
    importance = ImportanceCallback(
        ffn_site=settings.ffn_site,
        sublayers=settings.sublayers,
        provenance={"data_digest": info["data_digest"], "tokenizer_digest": info["tokenizer_digest"]},
        coverage=coverage,
        saving=ScoreCheckpointing(
            path=context.out / PARTIAL,
            every=settings.checkpoint_every,
            samples=len(windows),
            identity=identity,
            resume=before,
            stop_requested=context.stop_requested,
            stop=context.stop,
            take_signals=signals.take,
        ),
    )
    progress = ProgressDisplay(context.reporter, context.stage.name)
    trainer, model = _calibrator(context.input("model"), config, importance, progress)
    rate: float | None = None
    if before is None or before.consumed < len(windows):
        left = calibration_windows(context.input("data"), config, skip=0 if before is None else before.consumed)
        began = time.perf_counter()
        validate(model, left, micro_batch_size=settings.micro_batch_size, trainer=trainer)
        rate = len(left) * settings.sequence_length / (time.perf_counter() - began)
        assert importance.scores is not None  # a validation leaves them
        scores, losses = importance.scores, dict(importance.losses)
    else:
        scores = Scores(model.spec, before.sums, ffn_site=importance.ffn_site, provenance=importance.provenance)
        losses = dict(before.losses)
    scores = _with_more(context, trainer, model, scores)
    _leave(context, scores)
    return {
        "samples": scores.samples,
        "tokens": scores.tokens,
        "first_sample": settings.first_sample,
        "calibration_nats": per_token(losses)["ce"],
        **_speed(model, rate, settings.sequence_length),
        "summary": f"{scores.samples} samples, {scores.tokens:,} tokens",
    }


def _identity(coverage: Coverage, settings: ScoreConfig) -> dict[str, Any]:
    """What partial scores must be of, to go on with; keys of later versions are left out at their defaults."""
    sublayers = {"sublayers": True} if settings.sublayers else {}
    return {**coverage.to_dict(), "ffn_site": settings.ffn_site.value, **sublayers}


def _with_more(context: StageContext, trainer: Trainer, model: MegatronGPTModel, scores: Scores) -> Scores:
    """The same with depth metrics, losses of sublayers and sums for merging, as far as they are asked for."""
    settings = context.config.score
    if settings.depth.metrics:
        scores.depth = _depth(context, trainer, model)
    if settings.sublayers:
        sums = sublayer_losses(model.chunks, model.runtime, model.spec, context.input("data"), settings)
        scores = scores.with_sums(sums)
    if context.config.target.merge_layers:
        _merge(context, model, scores)
    return scores


def _leave(context: StageContext, scores: Scores) -> None:
    """Write the scores; what an attempt that is cut off would go on from is no longer needed."""
    if context.rank == 0:
        scores.save(context.out / FILE)
        for name in (PARTIAL, DEPTH_PARTIAL):
            (context.out / name).unlink(missing_ok=True)


def _speed(model: MegatronGPTModel, rate: float | None, sequence_length: int) -> dict[str, float | None]:
    """Tokens per second over all ranks, and the fraction of the GPUs' peak that they were scored at."""
    flops, devices = forward_flops(model.spec, sequence_length), model.runtime.world_size
    return {
        "tokens_per_second": None if rate is None else round(rate, 2),
        "mfu": speed.mfu(rate, flops, devices=devices, gpu=speed.gpu_name()),
    }


def calibrate(
    model_path: Path, data: Path, config: RunConfig, importance: ImportanceCallback, *others: Callback
) -> float:
    """Validate a model over the calibration samples with the callback attached; returns its nats per token."""
    trainer, model = _calibrator(model_path, config, importance, *others)
    windows = calibration_windows(data, config)
    return validate(model, windows, micro_batch_size=config.score.micro_batch_size, trainer=trainer)["val/ce"]


def calibration_windows(data: Path, config: RunConfig, *, skip: int = 0) -> WindowDataset:
    """The calibration samples that a recipe asks for, but for the first `skip` of them."""
    settings = config.score
    return WindowDataset(
        data,
        "calibration",
        settings.sequence_length,
        settings.samples - skip,
        first_window=settings.first_sample + skip,
    )


def _calibrator(model_path: Path, config: RunConfig, *callbacks: Callback) -> tuple[Trainer, MegatronGPTModel]:
    trainer = make_trainer(config, list(callbacks))
    size = config.score.micro_batch_size
    return trainer, restore(MegatronGPTModel, model_path, config=config, micro_batch_size=size, trainer=trainer)


def _merge(context: StageContext, model: MegatronGPTModel, scores: Scores) -> None:
    """Write the sums that dropped layers are merged by, for the plan that stage `prune` will make of the scores.

    One short pass; a run that is cut off in it begins it again.
    """
    target = target_of(context, open_checkpoint(context.input("teacher")).spec)
    plan = build_plan(scores, target, model.spec)
    sums = measure_merge(
        model.chunks, model.runtime, plan, context.input("data"), context.config.score, provenance=scores.provenance
    )
    if context.rank == 0:
        sums.save(context.out / MERGE_FILE)


def _depth(context: StageContext, trainer: Trainer, model: MegatronGPTModel) -> DepthScores:
    """The depth metrics of the recipe, with a display; stops between two batches when asked to."""
    with ExitStack() as stack:
        display: list[Any] = []

        def advance(done: int, total: int) -> None:
            if not display:
                bar = context.reporter.progress(f"{context.stage.name} depth", total=total, unit="samples", done=0)
                display.append(stack.enter_context(bar))
                display.append(0)
            display[0].advance(done - display[1])
            display[1] = done
            if trainer.strategy.reduce_boolean_decision(context.stop_requested(), all=False):
                context.stop()

        return measure_depth(
            model.chunks,
            model.runtime,
            model.spec,
            context.input("data"),
            context.config.score,
            tokenizer_files=model.tokenizer_files,
            partial=context.out / DEPTH_PARTIAL,
            progress=advance,
        )
