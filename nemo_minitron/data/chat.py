"""Conversations in JSONL to tokens and a mask of the answers, through the tokenizer's own chat template."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.tokenizer import end_of_document
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_PROBLEMS = 10
"""Faulty lines that one error names."""

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of one line, and where they come from."""

    where: str
    """File and line, for messages."""
    messages: tuple[Message, ...]
    """Each with `role` and `content`; at least one answer (role `assistant`)."""
    plain: bool
    """Whether it came as a prompt with an answer, which may do without a template."""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as the model sees it."""

    tokens: NDArray[np.int64]
    """`[n]`."""
    answer: NDArray[np.bool_]
    """`[n]`: which tokens an assistant has written, the end of its turn included. Never the first."""


def read_conversations(
    paths: Iterable[Path], *, prompt_key: str = "prompt", answer_key: str = "answer"
) -> list[Conversation]:
    """Every line of some JSONL files, or of those below some folders.

    Raises:
        DataError: There are none, or lines are faulty; names up to ten with file and line.
    """
    found: list[Conversation] = []
    problems: list[str] = []
    for path in paths:
        for where, line in _lines(path):
            try:
                found.append(_parse(line, where, prompt_key, answer_key))
            except ValueError as problem:
                problems.append(f"{where}: {problem}")
    _complain(problems)
    if not found:
        raise DataError("tune.sources: hold no conversations", rule="JSONL with one conversation a line")
    return found


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerFast", vocab_size: int
) -> list[Example]:
    """Tokens and answer masks.

    An answer is what the template adds for a message of the assistant behind its generation prompt: the text and the
    end of the turn. A message that begins a conversation answers nothing. Pairs of prompt and answer are simply joined,
    with an end-of-document token behind them, where the tokenizer has no template.

    Raises:
        DataError: There is no template for `messages`, or it does not take a conversation; names up to ten lines.
    """
    end = end_of_document(tokenizer, vocab_size)
    if tokenizer.chat_template is None and (chats := [one for one in conversations if not one.plain]):
        raise DataError(
            f"{chats[0].where}: messages, but the model's tokenizer has no chat template",
            rule="chat_template in tokenizer_config.json, or chat_template.jinja, lies beside the model's tokenizer",
            remedy="take a model with a template, put one beside it, or give prompt/answer pairs",
        )
    examples: list[Example] = []
    problems: list[str] = []
    for conversation in conversations:
        try:
            if tokenizer.chat_template is None:
                example = _joined(conversation, tokenizer, end)
            else:
                example = _templated(conversation, tokenizer)
            if example.tokens.max() >= vocab_size:
                raise ValueError(f"token {example.tokens.max()} is outside the model's vocabulary of {vocab_size}")
            examples.append(example)
        except ValueError as problem:
            problems.append(f"{conversation.where}: {problem}")
    _complain(problems)
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


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    files = (
        [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".ndjson"))
    )
    if not files:
        raise DataError(f"{path}: no conversations here", rule="a JSONL file, or a folder with .jsonl files")
    for file in files:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{file}:{number}", line


def _parse(line: bytes, where: str, prompt_key: str, answer_key: str) -> Conversation:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    if "messages" in record:
        return Conversation(where, _messages(record["messages"]), plain=False)
    for key in (prompt_key, answer_key):
        if not isinstance(record.get(key), str) or (key == answer_key and not record[key].strip()):
            raise ValueError(f"neither messages nor a text under {key!r} (found: {', '.join(record) or 'nothing'})")
    pair = ({"role": "user", "content": record[prompt_key]}, {"role": "assistant", "content": record[answer_key]})
    return Conversation(where, pair, plain=True)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is not a list with something in it")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) or not (key == "content" or message[key]):
                found = "has none" if key not in message else f"has {json.dumps(message[key])[:40]}"
                raise ValueError(f"message {number} needs a {key} (a text); it {found}")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in value):
        raise ValueError("no message of the assistant has any text, so there is nothing to learn")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _templated(conversation: Conversation, tokenizer: "PreTrainedTokenizerFast") -> Example:
    messages = [dict(message) for message in conversation.messages]
    text = _render(tokenizer, messages)
    spans = []
    for number, message in enumerate(messages):
        if number and message["role"] == "assistant":
            before = _render(tokenizer, messages[:number], add_generation_prompt=True)
            after = _render(tokenizer, messages[: number + 1])
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise ValueError(
                    f"the chat template writes message {number + 1} differently once others follow, so that its answer "
                    "cannot be told apart; make each answer the last message of a line of its own"
                )
            spans.append((len(before), len(after.rstrip())))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoding["offset_mapping"]).reshape(-1, 2)
    answer = np.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        # A token that begins in the generation prompt and ends in the answer (" the") is the answer's.
        answer |= (offsets[:, 1] > first) & (offsets[:, 0] < last)
    return _example(encoding["input_ids"], answer)


def _render(tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, str]], **more: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **more))
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template does not take it: {error}") from error


def _joined(conversation: Conversation, tokenizer: "PreTrainedTokenizerFast", end: int) -> Example:
    prompt, answer = (message["content"] for message in conversation.messages)
    first = tokenizer(prompt)["input_ids"]
    first = first[:-1] if first and first[-1] == end and len(first) > 1 else first
    second = [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]
    return _example([*first, *second], np.arange(len(first) + len(second)) >= len(first))


def _example(tokens: Sequence[int], answer: NDArray[np.bool_]) -> Example:
    if len(tokens) < 2 or not answer[1:].any():
        raise ValueError("no token of an answer follows another token, so there is nothing to learn")
    answer = answer.copy()
    answer[0] = False
    return Example(np.array(tokens, dtype=np.int64), answer)


def _complain(problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - MOST_PROBLEMS
        shown = [*problems[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise DataError(
            "tune.sources: faulty conversations\n" + "\n".join(f"  - {problem}" for problem in shown),
            rule='a line is {"messages": [{"role": "user", "content": "..."}, ...]}, or a prompt with an answer',
            remedy="mend or remove those lines",
        )
