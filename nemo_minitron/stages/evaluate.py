"""Evaluate: held-out perplexity, benchmark tasks, speed and one text sample of teacher, pruned and distilled model."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.callbacks.progress import ProgressDisplay
from nemo_minitron.callbacks.reporter import compact
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import MinitronError
from nemo_minitron.evaluation import held_out, speed
from nemo_minitron.evaluation.generate import end_tokens, greedy
from nemo_minitron.evaluation.perplexity import bits_per_byte, perplexity
from nemo_minitron.evaluation.scoring import TokenScorer
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.chain import MODELS
from nemo_minitron.stages.files import write_json
from nemo_minitron.stages.processes import mark_reported
from nemo_minitron.stages.session import make_trainer, restore, validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANSWERS = "answers"
"""Folder of what each model has answered to tasks so far; gone when all are done."""
SAMPLES = "tasks"
"""Folder of each model's answers to each item."""


def run(context: StageContext) -> dict[str, Any]:
    """Write `evaluation.json`; returns perplexities, bits per byte, task scores, speed and samples, by model."""
    folders = {name: context.input(name) for name in MODELS if name in context.stage.inputs}
    result: dict[str, Any] = {"perplexity": {}, "standard_error": {}, "nats": {}, "bits_per_byte": {}, "tasks": {}}
    result["samples"] = {"prompt": context.config.evaluate.prompt}
    for name, folder in folders.items():
        _one(context, name, folder, result)
    if not result["tasks"]:
        del result["tasks"]
    if context.config.evaluate.speed is not None:
        result["speed"] = _speed(context, folders)
    if context.rank == 0:
        write_json(context.out / "evaluation.json", result)
        shutil.rmtree(context.out / ANSWERS, ignore_errors=True)
    ratio = result["perplexity"]["distilled"] / result["perplexity"]["teacher"]
    return result | {"ratio": ratio, "summary": f"distilled perplexity is {ratio:.2f} times the teacher's"}


def _one(context: StageContext, name: str, folder: Path, result: dict[str, Any]) -> None:
    """Measure one checkpoint, and put what was found into the stage's result."""
    settings = context.config.evaluate
    trainer = make_trainer(context.config, [ProgressDisplay(context.reporter, name)])
    model = restore(
        MegatronGPTModel,
        folder,
        config=context.config,
        micro_batch_size=settings.micro_batch_size,
        trainer=trainer,
    )
    tokenizer = load_tokenizer(model.tokenizer_files)
    sizes = held_out.bytes_of_tokens(tokenizer, model.spec.vocab_size)
    added = held_out.added_bytes(tokenizer, sizes)
    if settings.stride is None:
        nats, tokens, bytes_, counts = _in_windows(context, model, sizes, trainer, added)
    else:
        nats, tokens, bytes_, counts = _in_documents(context, model, tokenizer, sizes, added)
    measured, rate = perplexity(nats, tokens), bits_per_byte(nats, bytes_)
    result["nats"][name] = measured.nats_per_token
    result["perplexity"][name] = measured.value
    result["standard_error"][name] = measured.standard_error
    result["bits_per_byte"][name] = {"value": rate.value, "standard_error": rate.standard_error}
    result |= asdict(counts)
    context.reporter.line(f"          {name:<9} perplexity {measured.value:.2f} · {rate.value:.4f} bits per byte")
    prompt = tokenizer.encode(settings.prompt)
    ends = end_tokens(tokenizer, model.tokenizer_files)
    new = greedy(model.chunks, model.runtime, prompt, settings.sample_tokens, ends=ends)
    result["samples"][name] = continued(tokenizer, prompt, new)
    if settings.tasks:
        result["tasks"][name] = _tasks(context, name, model, tokenizer)


def continued(tokenizer: "PreTrainedTokenizerFast", prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that new tokens add to a prompt's; alone, they would lose the space that some begin with."""
    whole, before = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in ([*prompt, *new], [*prompt]))
    return whole[len(before) :]


Measured = tuple[list[float], list[float], list[int], held_out.Counts]
"""Nats, tokens and bytes by unit of chance, and counts over all of them."""


def _in_windows(
    context: StageContext, model: MegatronGPTModel, sizes: NDArray[np.int64], trainer: Any, added: int
) -> Measured:
    """Windows at even distances over the stream of all held-out documents; the unit is a batch of windows."""
    settings = context.config.evaluate
    samples = -(-settings.max_tokens // settings.sequence_length)
    windows = WindowDataset(context.input("data"), held_out.SPLIT, settings.sequence_length, samples, spread=True)
    validate(model, windows, micro_batch_size=settings.micro_batch_size, trainer=trainer)
    reports = model.validation_reports
    batch = settings.micro_batch_size * model.runtime.dp_size
    bytes_, counts = held_out.counts_of_windows(windows, sizes, context.input("data"), batch, added=added)
    return [report["ce"] for report in reports], [report["tokens"] for report in reports], bytes_, counts


def _in_documents(
    context: StageContext,
    model: MegatronGPTModel,
    tokenizer: "PreTrainedTokenizerFast",
    sizes: NDArray[np.int64],
    added: int,
) -> Measured:
    """Complete held-out documents, each by itself; the unit is a document."""
    settings = context.config.evaluate
    stride = settings.sequence_length if settings.stride is None else settings.stride
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = held_out.documents(context.input("data"), settings.max_tokens, begin=begin)
    windows = [
        list(held_out.overlapping(text.tolist(), begin=begin, length=settings.sequence_length, stride=stride))
        for text in texts
    ]
    scorer = _scorer(model, tokenizer, settings.micro_batch_size)
    scores = iter(scorer.score([window for own in windows for window in own]))
    nats = [-sum(next(scores).logprob for _ in own) for own in windows]
    bytes_ = [int(sizes[text].sum()) - added for text in texts]
    counts = held_out.Counts(sum(map(len, texts)), sum(bytes_), len(texts))
    return nats, [float(len(text)) for text in texts], bytes_, counts


def _scorer(model: MegatronGPTModel, tokenizer: "PreTrainedTokenizerFast", batch_size: int) -> TokenScorer:
    ends = end_tokens(tokenizer, model.tokenizer_files)
    return TokenScorer(model.chunks, model.runtime, batch_size=batch_size, decode=tokenizer.decode, ends=ends)


def _tasks(
    context: StageContext, name: str, model: MegatronGPTModel, tokenizer: "PreTrainedTokenizerFast"
) -> dict[str, Any]:
    """Task scores of one model; rank 0 runs the harness, and the others compute what it asks for."""
    from nemo_minitron.evaluation.answers import AnswerFile
    from nemo_minitron.evaluation.harness import run_tasks
    from nemo_minitron.evaluation.leading import Leader, led
    from nemo_minitron.evaluation.lm_eval_model import MinitronLM

    settings = context.config.evaluate

    def work(leader: Leader) -> dict[str, Any]:
        (context.out / ANSWERS).mkdir(exist_ok=True)
        asked = MinitronLM(
            leader,
            tokenizer,
            answers=AnswerFile(context.out / ANSWERS / f"{name}.jsonl"),
            reporter=context.reporter,
            label=name,
        )
        return run_tasks(
            asked,
            settings.tasks,
            include_path=settings.include_path,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            seed=context.config.seed,
            samples_folder=context.out / SAMPLES / name,
        )

    try:
        found = led(_scorer(model, tokenizer, settings.task_batch_size), work)
    except MinitronError as error:
        raise error if context.rank == 0 else mark_reported(error) from None
    for task, row in found.items():
        metric = row["metrics"][row["metric"]]
        spread = "" if metric["standard_error"] is None else f" ± {metric['standard_error']:.4f}"
        context.reporter.line(f"          {name:<9} {task} {row['metric']} {metric['value']:.4f}{spread}")
    return found


def _speed(context: StageContext, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Teacher and finished student in turn, in one process, on held-out text."""
    settings = context.config.evaluate.speed
    assert settings is not None
    student = list(folders)[-1]
    models = {}
    for name in ("teacher", student):
        models[name] = restore(
            MegatronGPTModel,
            folders[name],
            config=context.config,
            micro_batch_size=1,
            trainer=make_trainer(context.config),
        )
    windows = WindowDataset(
        context.input("data"), held_out.SPLIT, settings.prompt_tokens, settings.batch_size, spread=True
    )
    prompts = [windows[index % len(windows)]["tokens"].tolist() for index in range(settings.batch_size)]
    found = speed.measure(
        {name: model.chunks for name, model in models.items()}, models["teacher"].runtime, prompts, settings
    )
    for name, row in found["models"].items():
        rates = f"prefill {compact(row['prefill_tokens_per_second'])} tokens/s, decode"
        context.reporter.line(
            f"          {name:<9} {rates} {row['decode_tokens_per_second']:.1f} tokens/s, "
            f"first token after {1000 * row['time_to_first_token']:.0f} ms"
        )
    return found | {"student": student}
