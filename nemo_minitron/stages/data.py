"""Data: texts to Megatron token files, shared out by document between training, calibration and held-out splits."""

from collections.abc import Iterator
from typing import Any

from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.data.assets import resolve
from nemo_minitron.data.documents import Document, read_documents
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.megatron.data import write_token_files
from nemo_minitron.stages.base import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Write `.bin/.idx` files and `data.json`; returns documents and tokens of each split."""
    teacher = open_checkpoint(context.input("teacher"))
    tokenizer = load_tokenizer(teacher.tokenizer_files())
    config = context.config
    info = write_token_files(
        _documents(context),
        tokenizer,
        context.out,
        config.data,
        seed=config.seed,
        vocab_size=teacher.spec.vocab_size,
    )
    return info | {"summary": ", ".join(f"{name} {split['tokens']:,} tokens" for name, split in info["splits"].items())}


def _documents(context: StageContext) -> Iterator[Document]:
    for source in context.config.data.sources:
        yield from read_documents(resolve(source), text_key=context.config.data.text_key)
