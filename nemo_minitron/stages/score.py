"""Score: importance of every layer, channel, neuron and head, from one forward pass over calibration text."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from nemo_minitron.callbacks.importance import ImportanceCallback
from nemo_minitron.callbacks.progress import ProgressDisplay
from nemo_minitron.config.run import RunConfig
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.session import make_trainer, restore, validate


def run(context: StageContext) -> dict[str, Any]:
    """Write `scores.safetensors`; returns how much text they rest on."""
    info = context.run.result("data")
    importance = ImportanceCallback(
        context.out / "scores.safetensors",
        provenance={"data_digest": info["data_digest"], "tokenizer_digest": info["tokenizer_digest"]},
    )
    nats = calibrate(
        context.input("model"),
        context.input("data"),
        context.config,
        importance,
        ProgressDisplay(context.reporter, "score"),
    )
    scores = importance.scores
    return {
        "samples": int(scores.samples),
        "tokens": int(scores.tokens),
        "calibration_nats": nats,
        "summary": f"{int(scores.samples)} samples, {int(scores.tokens):,} tokens",
    }


def calibrate(
    model_path: Path, data: Path, config: RunConfig, importance: ImportanceCallback, *others: Callback
) -> float:
    """Validate a model over the calibration split with the callback attached; returns its nats a token."""
    settings = config.score
    trainer = make_trainer(config, [importance, *others])
    model = restore(
        MegatronGPTModel, model_path, config=config, micro_batch_size=settings.micro_batch_size, trainer=trainer
    )
    windows = WindowDataset(data, "calibration", settings.sequence_length, settings.samples)
    return validate(model, windows, micro_batch_size=settings.micro_batch_size, trainer=trainer)["val/ce"]
