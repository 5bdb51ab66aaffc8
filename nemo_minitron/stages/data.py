"""Data: texts to Megatron token files, shared out by document between training, calibration and held-out splits."""

import shutil
import time
from contextlib import suppress
from typing import Any

from nemo_minitron.callbacks.reporter import Progress, compact
from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.config.run import RunConfig
from nemo_minitron.data.account import account, table
from nemo_minitron.data.assets import resolve
from nemo_minitron.data.claims import Claims
from nemo_minitron.data.shard_pool import default_workers, finished, help_with, make_shards, prepare
from nemo_minitron.data.shards import Shard, ShardJob, Unit
from nemo_minitron.data.survey import Survey, survey
from nemo_minitron.data.tally import Tally
from nemo_minitron.data.tokenizer import load_tokenizer, text_encoder
from nemo_minitron.errors import DataError, MinitronError
from nemo_minitron.megatron import launched
from nemo_minitron.megatron.token_files import merge_shards, scratch, token_dtype, write_blend_files
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.sources import write_sources

SHARDS = ".shards"
_MB = 1_000_000
_SHOWN_FROM = _MB
"""Bytes of sources from which on progress is shown."""


def run(context: StageContext) -> dict[str, Any]:
    """Write `.bin/.idx` files, `data.json` and `sources.json`; returns documents and tokens of each split."""
    config = context.config
    teacher = open_checkpoint(context.input("teacher"))
    tokenizer = load_tokenizer(teacher.tokenizer_files())
    if config.data.blend is not None:
        return _blend(context, tokenizer, teacher.spec.vocab_size)
    found = survey([resolve(source) for source in config.data.sources])
    vocab_size = teacher.spec.vocab_size
    with scratch(context.out):  # clears what a killed attempt has left
        job = ShardJob(
            files=found.files,
            text_key=config.data.text_key,
            min_characters=config.data.min_characters,
            seed=config.seed,
            encoder=text_encoder(tokenizer, vocab_size, parse_special_tokens=config.data.parse_special_tokens),
            dtype=token_dtype(vocab_size),
            folder=context.out / SHARDS,
        )
        shards = _tokenize(context, job, found)
        sums, tally = account(found, [part for shard in shards for part in shard.parts()])
        tally.check(config.data.max_bad_fraction)
        _check_any(tally, config)
        info = merge_shards(shards, tokenizer, context.out, config.data, seed=config.seed, vocab_size=vocab_size)
    write_sources(context.out, found)
    shutil.rmtree(job.folder, ignore_errors=True)
    for line in table(sums, config.data.sources):
        context.reporter.line(f"          {line}")
    told = [f"{name} {split['tokens']:,} tokens" for name, split in info["splits"].items()]
    if tally.bad:
        told.append(f"{tally.bad:,} bad documents skipped")
    return {**info, "sources": sums, "summary": ", ".join(told)}


def help_tokenize(context: StageContext, job: ShardJob) -> None:
    """On the first rank of each other node: make shards too, in a folder that all nodes see.

    What cannot be done here is left to rank 0, which says what is wrong if it cannot either.
    """
    if launched.local_rank() == 0:
        with suppress(MinitronError, OSError):
            help_with(job, context.config.data.workers or default_workers(), Claims(job.folder))


def _blend(context: StageContext, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Existing token files: `data.json`, and copies of what is calibrated and measured on."""
    config = context.config
    info = write_blend_files(tokenizer, context.out, config.data, seed=config.seed, vocab_size=vocab_size)
    told = [f"{name} {split['tokens']:,} tokens" for name, split in info["splits"].items()]
    return {**info, "summary": f"{len(info['blend']['prefixes'])} prefixes: {', '.join(told)}"}


def _check_any(tally: Tally, config: RunConfig) -> None:
    if not tally.documents:
        tally.check(0)
        named = ", ".join(f"{item.count:,} are {item.reason}" for item in tally.skipped)
        raise DataError(
            f"data.sources = {', '.join(config.data.sources)}: hold no text" + (f" ({named})" if named else ""),
            rule="at least one document of data.min_characters characters",
            remedy="give more texts, or lower data.min_characters",
        )


def _tokenize(context: StageContext, job: ShardJob, found: Survey) -> list[Shard]:
    """Every shard, with a progress line; those of an earlier attempt are taken as they are."""
    if lost := prepare(job):
        context.reporter.line(f"          {lost} shards of an earlier attempt do not count: sources or settings differ")
    before = sum(part["weight"] for shard in finished(job) for part in shard.parts())
    if before:
        context.reporter.line(f"          {before / 1e6:,.1f} MB were tokenized before")
    total = sum(file.size for file in job.files)
    workers = context.config.data.workers or default_workers()
    claims = Claims(job.folder) if context.world_size > 1 else None
    context.share(job)
    if total < _SHOWN_FROM:
        return make_shards(job, workers, _Watch(found, None), claims)
    with context.reporter.progress("data", -(-total // _MB), unit="MB", done=before // _MB) as progress:
        shards = make_shards(job, workers, _Watch(found, progress, before), claims)
        progress.advance(progress.total - progress.done, progress.fields)
        return shards


class _Watch:
    """Follows new shards: progress, speed, and whether the first one holds anything but bad documents."""

    def __init__(self, found: Survey, progress: Progress | None, before: int = 0) -> None:
        self._found = found
        self._progress = progress
        self._began = time.monotonic()
        self._weight, self._tokens = before, 0

    def __call__(self, unit: Unit, parts: list[dict[str, Any]]) -> None:
        if unit.number == 0:
            account(self._found, parts)[1].check_beginning()
        self._weight += unit.weight
        self._tokens += sum(part["tokens"] for part in parts)
        if self._progress is not None:
            speed = compact(self._tokens / max(time.monotonic() - self._began, 1e-6))
            self._progress.advance(self._weight // _MB - self._progress.done, {"": f"{speed} tokens/s"})
