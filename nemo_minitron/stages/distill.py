"""Distil: train the student on the teacher's distribution over the training split."""

from pathlib import Path
from typing import Any

from nemo_minitron.callbacks.distillation import DistillationMonitor
from nemo_minitron.callbacks.history import ValidationHistory
from nemo_minitron.config.cache import CacheConfig, TargetKind
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.distillation import MegatronGPTDistillationModel
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.training import train
from nemo_minitron.stages.training_job import TrainingJob


def run(context: StageContext) -> dict[str, Any]:
    """Write `student/` and `metrics.jsonl`; returns tokens, speed and validations.

    Each round takes the training samples in an order of its own, so that later rounds see other text as far as there is
    any.
    """
    settings = context.config.distill
    data = TokenDataModule(context.input("data"), settings, seed=order_seed(context))
    if context.config.cache is not None:
        return _from_cache(context, data, context.config.cache)
    job = TrainingJob(
        kind=MegatronGPTDistillationModel,
        model=context.input("student"),
        settings=settings,
        distillation=settings.with_teacher(context.input("teacher")),
        data=data,
        monitor=DistillationMonitor(),
        metric=watched(settings),
        result="student",
    )
    result = train(context, job)
    first, last = result["history"][0]["kl"], result["validation"]["kl"]
    return {
        **result,
        "objective": _objective(settings),
        "summary": f"KL to the teacher {first:.3f} -> {last:.3f} nats per token",
    }


def _from_cache(context: StageContext, data: TokenDataModule, cache: CacheConfig) -> dict[str, Any]:
    """The same without the teacher; validations have no targets, so the cross-entropy is what is watched."""
    settings = context.config.distill
    targets = context.input("cache") if cache.folder is None else Path(cache.folder)
    job = TrainingJob(
        kind=MegatronGPTDistillationModel,
        model=context.input("student"),
        settings=settings,
        distillation=settings.with_cache(targets),
        data=data,
        monitor=ValidationHistory(("ce",)),
        metric="ce",
        result="student",
    )
    result = train(context, job)
    first, last = result["history"][0]["ce"], result["validation"]["ce"]
    extent = f"{cache.draws} draws per token" if cache.kind is TargetKind.SAMPLED else f"{cache.k} ids per token"
    return {
        **result,
        "objective": f"{_objective(settings)}, from a cache of {extent}",
        "summary": f"cross-entropy {first:.3f} -> {last:.3f} nats per token",
    }


def order_seed(context: StageContext) -> int:
    """What the order of a round's training samples follows from."""
    return context.config.seed + context.stage.round - 1


def watched(settings: DistillConfig) -> str:
    """The validation metric that says how good the student is."""
    return "kl" if settings.kd_weight > 0 or settings.ramp_to.kd_weight else "ce"


def _objective(settings: DistillConfig) -> str:
    """The loss in words."""
    kind = settings.divergence.value.replace("_", " ").replace("kl", "KL")
    extent = f"the teacher's {settings.top_k} likeliest tokens" if settings.top_k else "the full vocabulary"
    parts = {f"{kind} over {extent}": "kd_weight", "cross-entropy on the text": "lm_weight"}
    if settings.hidden is not None:
        count = len(settings.hidden.layers) + settings.hidden.embedding
        parts[f"{settings.hidden.kind.value} of {count} pair(s) of hidden states"] = "hidden_weight"
    if settings.router_weight > 0:
        parts["KL of routers"] = "router_weight"
    if settings.balance_weight > 0:
        parts["load balance of routers"] = "balance_weight"
    named = {}
    for name, key in parts.items():
        first, last = getattr(settings, key), getattr(settings.ramp_to, key, None)
        if first or last:
            named[name] = f"{first:g}" if last in (None, first) else f"{first:g} to {last:g}"
    if list(named.values()) == ["1"]:
        return next(iter(named))
    return " + ".join(f"{weight} x {name}" for name, weight in named.items())
