"""Lines of JSONL to conversations: OpenAI's `messages`, ShareGPT's and NeMo 1's `conversations`, prompts with answers.

What a line says and what would change the training is taken over or refused by name, never dropped. A key whose value
is null is a key that is not there, as in tables where every row has every column.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.data.documents import cut
from nemo_minitron.data.streams import READ_ERRORS, damaged
from nemo_minitron.data.survey import LeftOut, survey
from nemo_minitron.data.tally import MAX_BAD_FRACTION
from nemo_minitron.errors import DataError
from nemo_minitron.json_lines import without_double_keys

MOST_PROBLEMS = 10
"""Faulty lines that one error names."""

Message = Mapping[str, Any]

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "chatbot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
}
"""What `from` says in ShareGPT's and NeMo's files, in lower case, and the role that it is."""

_RULE = 'a line is {"messages": [{"role": "user", "content": "..."}, ...]}, or a prompt with an answer'
_WEIGHTS = ("weight", "train", "training")
_REFUSED_IN_MESSAGE = ("train_detail", "training_detail", "loss_mask", "loss", "label", "canonical_form")


class RefusedError(ValueError):
    """A line says something that cannot be honoured; the stage stops, however few such lines there are."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of one line, and where they come from."""

    where: str
    """File and line, for messages."""
    messages: tuple[Message, ...]
    """Each with `role` and `content`, and what else a template can see; at least one answer (role `assistant`)."""
    plain: bool
    """Whether it came as a prompt with an answer, which may do without a template."""
    weights: tuple[bool, ...] = ()
    """Whether each message, if it is an answer, is learned; empty for all."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """What else the line holds: `tools`, `documents` and other variables of a template."""

    def is_learned(self, number: int) -> bool:
        """Whether message `number` (from 0) is an answer that counts."""
        return self.messages[number]["role"] == "assistant" and (not self.weights or self.weights[number])


@dataclass
class Reading:
    """What some files gave."""

    conversations: list[Conversation]
    problems: list[str]
    """Lines that are no conversations: where, and why."""
    left_out: Sequence[LeftOut]
    """Files that are not used."""


def read_lines(
    paths: Iterable[Path],
    *,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> Reading:
    """Every line of some JSONL files, compressed or not, or of those below some folders.

    Raises:
        DataError: There are none, more than a fraction of the lines is faulty, or a line says what cannot be honoured;
            names up to ten with file and line.
    """
    found = survey(paths)
    files = [file for file in found.files if file.kind == "jsonl"]
    others = [LeftOut(str(file.path), f"no conversations ({file.label})") for file in found.files if file not in files]
    if not files:
        raise DataError(
            f"{', '.join(item.path for item in others)}: no conversations here",
            rule="a JSONL file, or a folder with .jsonl files",
        )
    reading = Reading([], [], [*found.left_out, *others])
    refused: list[str] = []
    for file in files:
        for where, line in _lines(file):
            try:
                reading.conversations.append(parse(line, where, prompt_key, answer_key))
            except RefusedError as problem:
                refused.append(f"{where}: {problem}")
            except ValueError as problem:
                reading.problems.append(f"{where}: {problem}")
    complain(refused)
    check_bad(reading.problems, len(reading.conversations) + len(reading.problems), max_bad_fraction)
    if not reading.conversations:
        raise DataError("tune.sources: hold no conversations", rule="JSONL with one conversation a line")
    return reading


def check_bad(problems: Sequence[str], lines: int, max_bad_fraction: float) -> None:
    """Refuse more faulty lines than a fraction of all.

    Raises:
        DataError: Names up to ten of them.
    """
    if len(problems) > max_bad_fraction * lines:
        complain(problems, f"; at most {max_bad_fraction:g} of the lines may be faulty (data.max_bad_fraction)")


def complain(problems: Sequence[str], limit: str = "") -> None:
    """Raise an error that names up to ten lines, if there are any.

    Raises:
        DataError: There are.
    """
    if problems:
        more = len(problems) - MOST_PROBLEMS
        shown = [*problems[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise DataError(
            "tune.sources: faulty conversations\n" + "\n".join(f"  - {problem}" for problem in shown),
            rule=f"{_RULE}{limit}",
            remedy="mend or remove those lines",
        )


def _lines(file: Any) -> Iterator[tuple[str, bytes]]:
    number = 0
    for part in cut([file]):
        content = part.content
        if content is None:
            try:
                with file.path.open("rb") as stream:
                    stream.seek(part.first)
                    content = stream.read(-1 if part.stop is None else part.stop - part.first)
            except READ_ERRORS as error:
                raise damaged(file.path, error) from error
        lines = content.split(b"\n")
        for offset, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file.path}:{number + offset}", line
        number += len(lines) - 1


def parse(line: bytes, where: str, prompt_key: str, answer_key: str) -> Conversation:
    """One line.

    Raises:
        RefusedError: It says something that cannot be honoured.
        ValueError: It is no conversation.
    """
    record = _record(line)
    many = [key for key in ("messages", "conversations", "conversation") if key in record]
    if len(many) > 1:
        raise RefusedError(f"{many[0]} and {many[1]} in one line; give one of them")
    plain = False
    if many:
        turns = _turns(record.pop(many[0]), many[0])
    else:
        turns, plain = _pair(record, prompt_key, answer_key)
    turns = _with_system(record, turns)
    weights = _with_record_weight(record, [weight for _, weight in turns])
    _check_mask(record)
    _read_tools(record)
    messages = tuple(message for message, _ in turns)
    if not any(one["role"] == "assistant" and (one["content"].strip() or one.get("tool_calls")) for one in messages):
        raise ValueError("no message of the assistant has any text, so there is nothing to learn")
    answers = [weight for one, weight in zip(messages, weights, strict=True) if one["role"] == "assistant"]
    if not any(answers):
        raise ValueError("every answer has weight 0, so there is nothing to learn")
    return Conversation(where, messages, plain and len(messages) == 2, () if all(weights) else tuple(weights), record)


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=without_double_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    if b"\\u" in line:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("half a surrogate pair in a text") from error
    return {key: value for key, value in record.items() if value is not None}


def _turns(value: Any, name: str) -> list[tuple[dict[str, Any], bool]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is not a list with something in it")
    return [_message(number, message) for number, message in enumerate(value, start=1)]


def _message(number: int, message: Any) -> tuple[dict[str, Any], bool]:
    """A message with `role`, `content` and what else it has, and whether it is to be learned."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is not an object")
    given, message = message, {key: value for key, value in message.items() if value is not None}
    refused = [key for key in _REFUSED_IN_MESSAGE if message.get(key) not in (None, "")]
    if refused:
        raise RefusedError(f"message {number}: {refused[0]} is not honoured here; a message counts by weight 0 or 1")
    weight = all(_weight(message.pop(key), f"message {number}: {key}") for key in _WEIGHTS if key in message)
    _check_doubled(number, message)
    if "role" not in message and isinstance(message.get("from"), str):
        message = {"role": _role(number, message.pop("from")), **message}
    if "content" not in message and "value" in message and "value" in given:
        message["content"] = message.pop("value")
    role = message.pop("role", None)
    if not isinstance(role, str) or not role:
        raise _missing(number, "role", given, role)
    if "content" not in message and message.get("tool_calls"):
        message["content"] = ""
    content = _joined_parts(number, message.pop("content", None))
    if content is None:
        raise _missing(number, "content", given, given.get("content", given.get("value")))
    return {"role": role, "content": content, **message}, weight


def _check_doubled(number: int, message: Mapping[str, Any]) -> None:
    """Two spellings of one thing in a message say the same."""
    role, other = message.get("role"), message.get("from")
    if role is not None and isinstance(other, str) and role not in (other, _ROLES.get(other.strip().lower())):
        raise RefusedError(f"message {number}: role is {json.dumps(role)}, but from is {json.dumps(other)}")
    if "content" in message and isinstance(message.get("value"), str) and message["content"] != message["value"]:
        raise RefusedError(f"message {number}: content and value are two texts; give one of them")


def _missing(number: int, key: str, given: Mapping[str, Any], value: Any) -> ValueError:
    other = {"role": "from", "content": "value"}[key]
    found = f"has {json.dumps(value)[:40]}" if key in given or other in given else "has none"
    return ValueError(f"message {number} needs a {key} (a text); it {found}")


def _role(number: int, name: str) -> str:
    role = _ROLES.get(name.strip().lower())
    if role is None:
        known = ", ".join(sorted(_ROLES))
        raise RefusedError(f"message {number}: from {name!r} is no role (known: {known}); give it as role and content")
    return role


def _joined_parts(number: int, content: Any) -> str | None:
    """A content as one text; None when it is none."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text":
            raise RefusedError(f"message {number}: a part of type {kind!r} cannot be trained on here; parts are texts")
        if not isinstance(part, dict) or not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _weight(value: Any, name: str) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RefusedError(f"{name} is {json.dumps(value)}; a message counts (1) or does not (0)")


def _pair(record: dict[str, Any], prompt_key: str, answer_key: str) -> tuple[list[tuple[dict[str, Any], bool]], bool]:
    """A prompt with an answer, each a text or a list of messages; and whether both are texts."""
    prompt, answer = record.get(prompt_key), record.get(answer_key)
    said = {prompt_key: isinstance(prompt, str) or _is_list(prompt), answer_key: _is_said(answer) or _is_list(answer)}
    for key, is_said in said.items():
        if not is_said:
            raise ValueError(f"neither messages nor a text under {key!r} (found: {', '.join(record) or 'nothing'})")
    del record[prompt_key], record[answer_key]
    before, behind = _side(prompt, "user", prompt_key), _side(answer, "assistant", answer_key)
    # What an assistant has said in a prompt is no answer of this line.
    before = [(message, weight and message["role"] != "assistant") for message, weight in before]
    return [*before, *behind], isinstance(prompt, str) and isinstance(answer, str)


def _side(value: Any, role: str, key: str) -> list[tuple[dict[str, Any], bool]]:
    return [({"role": role, "content": value}, True)] if isinstance(value, str) else _turns(value, key)


def _is_said(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _with_system(record: dict[str, Any], turns: list[tuple[dict[str, Any], bool]]) -> list[tuple[dict[str, Any], bool]]:
    """Put a `system` beside the messages in front of them."""
    system = record.pop("system", "")
    if not isinstance(system, str):
        raise RefusedError(f"system is a {type(system).__name__}; it is a text")
    if not system.strip():
        return turns
    if turns[0][0]["role"] != "system":
        return [({"role": "system", "content": system}, True), *turns]
    if turns[0][0]["content"].strip() != system.strip():
        raise RefusedError("system beside the messages, and another one in the first message; give one of them")
    return turns


def _with_record_weight(record: dict[str, Any], weights: list[bool]) -> list[bool]:
    return weights if _weight(record.pop("weight", 1), "weight") else [False] * len(weights)


def _read_tools(record: dict[str, Any]) -> None:
    """Tools may be a list, or that list as JSON in a text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            record["tools"] = tools = json.loads(tools) if tools.strip() else []
        except ValueError as error:
            raise RefusedError(f"tools is a text that is not JSON ({error})") from error
    if "tools" in record and not isinstance(tools, list):
        raise RefusedError(f"tools is a JSON {type(tools).__name__}, not a list")
    if not tools:
        record.pop("tools", None)


def _check_mask(record: dict[str, Any]) -> None:
    """NeMo 1's `mask` names whose turns are not learned, and `type` a kind of file with labels."""
    mask = record.pop("mask", "User")
    if not isinstance(mask, str) or _ROLES.get(mask.strip().lower()) != "user":
        raise RefusedError(
            f"mask is {json.dumps(mask)}; what is learned are the assistant's turns, so that it is the user"
        )
    kind = record.get("type")
    if kind in ("VALUE_TO_TEXT", "TEXT_TO_VALUE"):
        raise RefusedError(f"type is {kind}; labels of attributes are not trained on here")
