"""Chat: conversations to token files with a mask of the answers, for stage tune; early, so that faults show early."""

from typing import Any

from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.data.assets import resolve
from nemo_minitron.data.chat import encode_conversations, held_out, read_conversations
from nemo_minitron.data.tokenizer import end_of_document, load_tokenizer
from nemo_minitron.megatron.chat_files import write_chat_files
from nemo_minitron.stages.base import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Write `train` and `validation` files and `chat.json`; returns how much is in them."""
    settings = context.config.tune
    assert settings is not None, "the chain has this stage only with its section"
    teacher = open_checkpoint(context.input("teacher"))
    tokenizer = load_tokenizer(teacher.tokenizer_files())
    vocab_size = teacher.spec.vocab_size
    conversations = read_conversations(
        map(resolve, settings.sources), prompt_key=settings.prompt_key, answer_key=settings.answer_key
    )
    examples = encode_conversations(conversations, tokenizer, vocab_size)
    flags = held_out(conversations, settings.validation_fraction, context.config.seed)
    info = write_chat_files(
        {
            "train": [example for example, held in zip(examples, flags, strict=True) if not held],
            "validation": [example for example, held in zip(examples, flags, strict=True) if held],
        },
        context.out,
        sequence_length=settings.batch.sequence_length,
        too_long=settings.too_long,
        vocab_size=vocab_size,
        fill=end_of_document(tokenizer, vocab_size),
    )
    told = (
        f"{name} {split['conversations']:,} conversations, {split['answer_tokens']:,} tokens of answers"
        for name, split in info["splits"].items()
    )
    return {**info, "template": tokenizer.chat_template is not None, "summary": "; ".join(told)}
