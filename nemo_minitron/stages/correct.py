"""Correct: fine-tune the teacher on the distillation data, so that it teaches what it knows about these texts."""

from typing import Any

from nemo_minitron.callbacks.history import ValidationHistory
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.training import train
from nemo_minitron.stages.training_job import TrainingJob


def run(context: StageContext) -> dict[str, Any]:
    """Write `teacher/` and `metrics.jsonl`; returns tokens, speed and validations."""
    settings = context.config.correct
    assert settings is not None, "the chain has this stage only with its section"
    job = TrainingJob(
        kind=MegatronGPTModel,
        model=context.input("model"),
        settings=settings,
        data=TokenDataModule(context.input("data"), settings, seed=context.config.seed),
        monitor=ValidationHistory(("ce",)),
        metric="ce",
        result="teacher",
    )
    result = train(context, job)
    first, last = result["history"][0]["ce"], result["validation"]["ce"]
    return {**result, "summary": f"the teacher's cross-entropy {first:.3f} -> {last:.3f} nats per token"}
