"""Chat: conversations to token files with a mask of the answers, for stage tune; early, so that faults show early."""

from typing import Any

from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.data.assets import resolve
from nemo_minitron.data.chat import Example, encode_each, held_out
from nemo_minitron.data.chat_lines import MOST_PROBLEMS, check_bad, read_lines
from nemo_minitron.data.tokenizer import end_of_document, load_tokenizer
from nemo_minitron.megatron.chat_files import write_chat_files
from nemo_minitron.stages.base import StageContext

_SHOWN = MOST_PROBLEMS


def run(context: StageContext) -> dict[str, Any]:
    """Write `train` and `validation` files and `chat.json`; returns how much is in them."""
    settings = context.config.tune
    assert settings is not None, "the chain has this stage only with its section"
    teacher = open_checkpoint(context.input("teacher"))
    tokenizer = load_tokenizer(teacher.tokenizer_files())
    vocab_size = teacher.spec.vocab_size
    limit = context.config.data.max_bad_fraction
    reading = read_lines(
        map(resolve, settings.sources),
        prompt_key=settings.prompt_key,
        answer_key=settings.answer_key,
        max_bad_fraction=limit,
    )
    parse = context.config.data.parse_special_tokens
    encoded = encode_each(reading.conversations, tokenizer, vocab_size, parse_special_tokens=parse)
    problems = [*reading.problems, *(problem for problem in encoded if isinstance(problem, str))]
    check_bad(problems, len(encoded) + len(reading.problems), limit)
    good = [(talk, one) for talk, one in zip(reading.conversations, encoded, strict=True) if isinstance(one, Example)]
    flags = held_out([talk for talk, _ in good], settings.validation_fraction, context.config.seed)
    info = write_chat_files(
        {
            "train": [one for (_, one), held in zip(good, flags, strict=True) if not held],
            "validation": [one for (_, one), held in zip(good, flags, strict=True) if held],
        },
        context.out,
        sequence_length=settings.batch.sequence_length,
        too_long=settings.too_long,
        vocab_size=vocab_size,
        fill=end_of_document(tokenizer, vocab_size),
    )
    for item in reading.left_out:
        context.reporter.line(f"          not used: {item.path}: {item.reason}")
    for problem in problems[:_SHOWN]:
        context.reporter.line(f"          skipped: {problem}")
    sources = {
        "conversations": len(good),
        "skipped": len(problems),
        "first": problems[:_SHOWN],
        "left_out": [{"path": item.path, "reason": item.reason} for item in reading.left_out],
    }
    told = [_told(name, split, settings.batch.sequence_length) for name, split in info["splits"].items()]
    if problems:
        told.append(f"{len(problems):,} faulty lines skipped")
    template = tokenizer.chat_template is not None
    return {**info, "template": template, "sources": sources, "summary": "; ".join(told)}


def _told(name: str, split: dict[str, Any], length: int) -> str:
    """One split, with what did not fit."""
    parts = [f"{name} {split['conversations']:,} conversations, {split['answer_tokens']:,} tokens of answers"]
    if split["cut"]:
        parts.append(f"{split['cut']:,} cut at {length:,} tokens")
    if split["left_out"]:
        parts.append(f"{split['left_out']:,} left out (no answer within {length:,} tokens, or too long)")
    return ", ".join(parts)
