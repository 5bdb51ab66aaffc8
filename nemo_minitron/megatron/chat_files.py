"""Conversations as token files with a mask of the answers, and as samples to train and validate on.

`train` and `validation` each have a pair of Megatron's files for tokens and another for the mask (`train_answer`), one
sequence a conversation; `chat.json`, which says what is in them, is written last, so a folder that has it is complete.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from torch import Tensor
from torch.utils.data import Dataset

from nemo_minitron.config.tuning import TooLong
from nemo_minitron.data.chat import Example
from nemo_minitron.errors import DataError

INFO_NAME = "chat.json"
SPLITS = ("train", "validation")


def write_chat_files(
    splits: dict[str, Sequence[Example]],
    folder: Path,
    *,
    sequence_length: int,
    too_long: TooLong,
    vocab_size: int,
    fill: int,
) -> dict[str, Any]:
    """Write conversations of at most `sequence_length + 1` tokens; returns what `chat.json` holds. Called by one rank.

    Raises:
        DataError: A split has nothing left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".chat-"))
    try:
        info: dict[str, Any] = {"fill": fill, "sequence_length": sequence_length, "splits": {}}
        for name in SPLITS:
            fitting = _fitting(splits[name], sequence_length + 1, too_long)
            if not fitting:
                raise DataError(
                    f"tune: no {name} conversation fits {sequence_length} tokens with an answer in it",
                    remedy="raise tune.batch.sequence_length, or give shorter conversations",
                )
            longer = sum(len(example.tokens) > sequence_length + 1 for example in splits[name])
            left_out = len(splits[name]) - len(fitting)
            info["splits"][name] = {
                "conversations": len(fitting),
                "left_out": left_out,
                "cut": longer - left_out,
                "tokens": int(sum(len(example.tokens) for example in fitting)),
                "answer_tokens": int(sum(example.answer.sum() for example in fitting)),
                "sha256": _write(temporary / name, fitting, vocab_size),
            }
        (temporary / INFO_NAME).write_text(json.dumps(info, indent=2) + "\n")
        (folder / INFO_NAME).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == INFO_NAME):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Conversations as samples of one length, answers kept and all else masked.

    An item is a dict of `tokens`, `labels`, `loss_mask` and `position_ids`, each `[sequence_length]`; item None is a
    sample that is masked throughout. What is left of a sample is filled up with end-of-document tokens, which causal
    attention hides from all before them. With `pack`, as many conversations as fit lie one behind the other; none
    predicts the first token of the next, and positions begin again with each, at which attention stops.

    Args:
        folder: What `write_chat_files` wrote.
        split: `train` or `validation`.
        pack: Whether to put several conversations into one sample.
        reset_attention_mask: Whether positions begin again with each of them; False lets later ones see earlier ones.
        samples: How many items there are, in an order by `seed`; every row comes once before any comes again. None for
            each row once, as they lie.
        most: Rows to take at most, in the order in which they lie; None for all.
        seed: Order of the items, if `samples` is given.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        pack: bool = False,
        reset_attention_mask: bool = True,
        samples: int | None = None,
        most: int | None = None,
        seed: int = 0,
    ) -> None:
        info = json.loads((folder / INFO_NAME).read_text())
        self._length = info["sequence_length"]
        self._fill = info["fill"]
        self._tokens = IndexedDataset(str(folder.resolve() / split), mmap=True)
        self._answers = IndexedDataset(str(folder.resolve() / f"{split}_answer"), mmap=True)
        lengths = [int(length) for length in self._tokens.sequence_lengths]
        self._rows = _packed(lengths, self._length + 1) if pack else [[index] for index in range(len(lengths))]
        self._rows = self._rows[:most]
        self._separate = reset_attention_mask
        self._samples = len(self._rows) if samples is None else samples
        self._seed = None if samples is None else seed
        self._orders: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        if index is not None and not 0 <= index < self._samples:
            raise IndexError(index)
        row = [] if index is None else self._rows[self._place(index)]
        tokens = torch.full((self._length + 1,), self._fill)
        keep = torch.zeros(self._length + 1, dtype=torch.bool)
        positions = torch.arange(self._length + 1)
        start = 0
        for conversation in row:
            values = torch.from_numpy(self._tokens[conversation].astype(np.int64))
            tokens[start : start + len(values)] = values
            keep[start : start + len(values)] = torch.from_numpy(self._answers[conversation].astype(bool))
            keep[start] = False
            if self._separate:
                positions[start:] -= positions[start].clone()
            start += len(values)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": keep[1:].float(),
            "position_ids": positions[:-1],
        }

    def _place(self, index: int) -> int:
        """Which row an item is: epoch after epoch, each in an order that follows from seed and epoch alone."""
        if self._seed is None:
            return index
        epoch, place = divmod(index, len(self._rows))
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))}
        return int(self._orders[epoch][place])


def _fitting(examples: Sequence[Example], most: int, too_long: TooLong) -> list[Example]:
    if too_long is TooLong.LEAVE_OUT:
        return [example for example in examples if len(example.tokens) <= most]
    cut = (Example(example.tokens[:most], example.answer[:most]) for example in examples)
    return [example for example in cut if example.answer.any()]


def _packed(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Conversations in order, as many into each row as fit."""
    rows: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = most
        rows[-1].append(index)
        room -= length
    return rows


def _write(prefix: Path, examples: Sequence[Example], vocab_size: int) -> str:
    """One pair of files for tokens and one for the mask; returns their digest."""
    digest = hashlib.sha256()
    for suffix, dtype in (("", DType.optimal_dtype(vocab_size)), ("_answer", np.uint8)):
        path = prefix.with_name(prefix.name + suffix)
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
        for example in examples:
            builder.add_document(example.answer if suffix else example.tokens, [len(example.tokens)])
        builder.finalize(f"{path}.idx")
        for ending in (".bin", ".idx"):
            with Path(f"{path}{ending}").open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
