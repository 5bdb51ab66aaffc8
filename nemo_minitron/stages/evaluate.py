"""Evaluate: held-out perplexity of teacher, pruned and distilled model, and one text sample of each."""

from pathlib import Path
from typing import Any

from nemo_minitron.callbacks.progress import ProgressDisplay
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.evaluation.generate import greedy
from nemo_minitron.evaluation.perplexity import Perplexity, perplexity
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.chain import MODELS
from nemo_minitron.stages.files import write_json
from nemo_minitron.stages.session import make_trainer, restore, validate


def run(context: StageContext) -> dict[str, Any]:
    """Write `evaluation.json`; returns perplexities, nats a token and samples, by model."""
    folders = {name: context.input(name) for name in MODELS if name in context.stage.inputs}
    result: dict[str, Any] = {"perplexity": {}, "standard_error": {}, "nats": {}}
    result["samples"] = {"prompt": context.config.evaluate.prompt}
    for name, folder in folders.items():
        measured, text = _one(context, name, folder)
        result["nats"][name] = measured.nats_per_token
        result["perplexity"][name] = measured.value
        result["standard_error"][name] = measured.standard_error
        result["samples"][name] = text
        result["tokens"] = measured.tokens
        context.reporter.line(f"          {name:<9} perplexity {measured.value:.2f}")
    if context.rank == 0:
        write_json(context.out / "evaluation.json", result)
    ratio = result["perplexity"]["distilled"] / result["perplexity"]["teacher"]
    return result | {"ratio": ratio, "summary": f"distilled perplexity is {ratio:.2f} times the teacher's"}


def _one(context: StageContext, name: str, folder: Path) -> tuple[Perplexity, str]:
    """Perplexity and greedy text of one checkpoint."""
    settings = context.config.evaluate
    trainer = make_trainer(context.config, [ProgressDisplay(context.reporter, name)])
    model = restore(
        MegatronGPTModel,
        folder,
        config=context.config,
        micro_batch_size=settings.micro_batch_size,
        trainer=trainer,
    )
    samples = -(-settings.max_tokens // settings.sequence_length)
    windows = WindowDataset(context.input("data"), "heldout", settings.sequence_length, samples, spread=True)
    validate(model, windows, micro_batch_size=settings.micro_batch_size, trainer=trainer)
    reports = model.validation_reports
    measured = perplexity([report["ce"] for report in reports], [report["tokens"] for report in reports])
    tokenizer = load_tokenizer(model.tokenizer_files)
    prompt = tokenizer.encode(settings.prompt)
    tokens = greedy(model.chunks, model.runtime, prompt, settings.sample_tokens, end=tokenizer.eos_token_id)
    return measured, str(tokenizer.decode(tokens, skip_special_tokens=True))
