"""Tune: supervised fine-tuning of the distilled student on conversations; only their answers are learned."""

from typing import Any

from nemo_minitron.callbacks.distillation import DistillationMonitor
from nemo_minitron.callbacks.history import ValidationHistory
from nemo_minitron.models.data import ChatDataModule
from nemo_minitron.models.distillation import MegatronGPTDistillationModel
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.training import train
from nemo_minitron.stages.training_job import TrainingJob


def run(context: StageContext) -> dict[str, Any]:
    """Write `student/` and `metrics.jsonl`; returns tokens, speed and validations."""
    settings = context.config.tune
    assert settings is not None, "the chain has this stage only with its section"
    taught = settings.kd_weight > 0
    job = TrainingJob(
        kind=MegatronGPTDistillationModel if taught else MegatronGPTModel,
        model=context.input("student"),
        settings=settings,
        distillation=settings.as_distillation().with_teacher(context.input("teacher")) if taught else None,
        data=ChatDataModule(context.input("tokenize_chat"), settings, seed=context.config.seed),
        monitor=DistillationMonitor() if taught else ValidationHistory(("ce",)),
        metric="ce",
        result="student",
    )
    result = train(context, job)
    first, last = result["history"][0]["ce"], result["validation"]["ce"]
    return {**result, "summary": f"cross-entropy of held-out answers {first:.3f} -> {last:.3f} nats per token"}
