"""Conversations to tokens and a mask of the answers, through the tokenizer's own chat template."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.chat_lines import Conversation, RefusedError, complain, read_lines
from nemo_minitron.data.chat_text import ChatText
from nemo_minitron.data.tally import MAX_BAD_FRACTION
from nemo_minitron.data.tokenizer import end_of_document
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Conversation", "Example", "encode_conversations", "encode_each", "held_out", "read_conversations"]

_TRAINED = frozenset(
    {
        *("tools", "documents", "functions", "function_call", "chat_template_kwargs"),
        *("images", "image", "videos", "video", "audios", "audio"),
        *("chosen", "rejected", "train_on_inputs", "loss_mask"),
        *("tool_calls", "reasoning_content", "reasoning", "thinking", "tool_plan"),
    }
)
"""Keys of a line or a message that would change what is trained: one that the template does not read is refused."""

_BESIDE_PROMPT = frozenset({"input", "context", "history"})
"""Keys beside a prompt that would be a part of it."""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as the model sees it."""

    tokens: NDArray[np.int64]
    """`[n]`."""
    answer: NDArray[np.bool_]
    """`[n]`: which tokens an assistant has written, the end of its turn included. Never the first."""


def read_conversations(
    paths: Iterable[Path],
    *,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> list[Conversation]:
    """Every line of some JSONL files, or of those below some folders, that is a conversation.

    Raises:
        DataError: There are none, or more than a fraction of the lines is faulty; names up to ten with file and line.
    """
    return read_lines(
        paths, prompt_key=prompt_key, answer_key=answer_key, max_bad_fraction=max_bad_fraction
    ).conversations


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerFast",
    vocab_size: int,
    *,
    parse_special_tokens: bool = False,
) -> list[Example]:
    """Tokens and answer masks, as `encode_each`, where each conversation must be one.

    Raises:
        DataError: There is no template for `messages`, or it does not take a conversation; names up to ten lines.
    """
    found = encode_each(conversations, tokenizer, vocab_size, parse_special_tokens=parse_special_tokens)
    complain([problem for problem in found if isinstance(problem, str)])
    return [example for example in found if isinstance(example, Example)]


def encode_each(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerFast",
    vocab_size: int,
    *,
    parse_special_tokens: bool = False,
) -> list[Example | str]:
    """Tokens and answer masks, or why there are none: the line and the reason.

    An answer is what the template adds for a message of the assistant behind its generation prompt: the text and the
    end of the turn. A message that begins a conversation answers nothing, and one of weight 0 is not learned. Pairs of
    prompt and answer are simply joined, with an end-of-document token behind them, where the tokenizer has no template.

    Raises:
        DataError: There is no template for `messages`, or a line says what the template does not read.
    """
    end = end_of_document(tokenizer, vocab_size)
    if tokenizer.chat_template is None and (chats := [one for one in conversations if not one.plain]):
        raise DataError(
            f"{chats[0].where}: messages, but the model's tokenizer has no chat template",
            rule="chat_template in tokenizer_config.json, or chat_template.jinja, lies beside the model's tokenizer",
            remedy="take a model with a template, put one beside it, or give prompt/answer pairs",
        )
    text = ChatText(tokenizer, parse_special_tokens=parse_special_tokens)
    examples: list[Example | str] = []
    refused: list[str] = []
    for conversation in conversations:
        try:
            if tokenizer.chat_template is None:
                _check_read(conversation, "")
                example = _joined(conversation, tokenizer, end, parse=parse_special_tokens)
            else:
                example = _templated(conversation, tokenizer, text)
            if example.tokens.max() >= vocab_size:
                raise ValueError(f"token {example.tokens.max()} is outside the model's vocabulary of {vocab_size}")
            examples.append(example)
        except RefusedError as problem:
            refused.append(f"{conversation.where}: {problem}")
        except ValueError as problem:
            examples.append(f"{conversation.where}: {problem}")
    complain(refused)
    return examples


def held_out(conversations: Sequence[Conversation], fraction: float, seed: int) -> list[bool]:
    """Which conversations are for validation: those whose contents hash lowest, at least one, equal ones together.

    Raises:
        DataError: None would be left to train on.
    """
    keys = [
        hashlib.sha256(json.dumps([seed, [dict(item) for item in one.messages]]).encode()).digest()
        for one in conversations
    ]
    count = max(1, round(fraction * len(keys)))
    chosen = set(sorted(keys)[:count])
    flags = [key in chosen for key in keys]
    if all(flags):
        raise DataError(
            f"tune.sources: {len(keys)} conversation(s) for training and validation",
            rule="at least two different ones",
            remedy="give more conversations",
        )
    return flags


def _template_of(tokenizer: "PreTrainedTokenizerFast", tools: Any) -> str:
    """The template that the tokenizer takes; it may have another one for conversations with tools."""
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise RefusedError(f"the tokenizer's chat template cannot be chosen: {error}") from error


def _check_read(conversation: Conversation, template: str) -> dict[str, Any]:
    """The variables of a line that the template reads; refuses those that it does not and that would change the result.

    Raises:
        RefusedError: Names the key.
    """
    context = dict(conversation.context)
    more = context.pop("chat_template_kwargs", None) or {}
    if not isinstance(more, Mapping):
        raise RefusedError("chat_template_kwargs is no object")
    unread = [key for key in more if not _reads(template, key)]
    trained = _TRAINED | _BESIDE_PROMPT if conversation.plain else _TRAINED
    unread += [key for key, value in context.items() if key in trained and value and not _reads(template, key)]
    for message in conversation.messages:
        unread += [key for key, value in message.items() if key in _TRAINED and value and not _reads(template, key)]
    if unread:
        raise RefusedError(f"{unread[0]}: the chat template does not read it, so that the model would not see it")
    return {key: value for key, value in {**context, **more}.items() if _reads(template, key)}


def _reads(template: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", template) is not None


def _templated(conversation: Conversation, tokenizer: "PreTrainedTokenizerFast", text: ChatText) -> Example:
    variables = _check_read(conversation, _template_of(tokenizer, conversation.context.get("tools")))
    messages, variables = text.hidden([dict(message) for message in conversation.messages], variables)
    rendered = _render(tokenizer, messages, **variables)
    spans = []
    for number in range(1, len(messages)):
        if conversation.is_learned(number):
            before = _render(tokenizer, messages[:number], add_generation_prompt=True, **variables)
            after = _render(tokenizer, messages[: number + 1], **variables)
            if not (after.startswith(before) and rendered.startswith(after.rstrip())):
                raise ValueError(
                    f"the chat template writes message {number + 1} differently once others follow, so that its answer "
                    "cannot be told apart; make each answer the last message of a line of its own"
                )
            spans.append((len(before), len(after.rstrip())))
    ids, offsets, spans = text.encode(rendered, spans)
    answer = np.zeros(len(ids), dtype=bool)
    for first, last in spans:
        # A token that begins in the generation prompt and ends in the answer (" the") is the answer's.
        answer |= (offsets[:, 1] > first) & (offsets[:, 0] < last)
    return _example(ids, answer)


def _render(tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, Any]], **more: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **more))
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template does not take it: {error}") from error


def _joined(conversation: Conversation, tokenizer: "PreTrainedTokenizerFast", end: int, *, parse: bool) -> Example:
    prompt, answer = (message["content"] for message in conversation.messages)
    first = tokenizer(prompt, split_special_tokens=not parse)["input_ids"]
    first = first[:-1] if first and first[-1] == end and len(first) > 1 else first
    second = [*tokenizer(answer, add_special_tokens=False, split_special_tokens=not parse)["input_ids"], end]
    return _example([*first, *second], np.arange(len(first) + len(second)) >= len(first))


def _example(tokens: Sequence[int], answer: NDArray[np.bool_]) -> Example:
    if len(tokens) < 2 or not answer[1:].any():
        raise ValueError("no token of an answer follows another token, so there is nothing to learn")
    answer = answer.copy()
    answer[0] = False
    return Example(np.array(tokens, dtype=np.int64), answer)
