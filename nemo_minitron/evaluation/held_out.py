"""Held-out documents to measure on: complete ones in windows that overlap, and how many bytes tokens stand for."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.evaluation.scoring import Continuation
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.megatron.token_files import open_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLIT = "heldout"


@dataclass(frozen=True, slots=True)
class Counts:
    """What was predicted."""

    tokens: int
    bytes: int
    documents: int


def bytes_of_tokens(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> NDArray[np.int64]:
    """How many bytes of text each token stands for, `[vocab_size]`; special tokens stand for none.

    A token of a byte-level vocabulary is a letter a byte; in others a token spells itself, with a mark for a space and
    `<0x41>` for a byte that has no token.
    """
    backend = tokenizer.backend_tokenizer
    by_bytes = "ByteLevel" in json.dumps(json.loads(backend.to_str()).get("decoder"))
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for text, number in backend.get_vocab(with_added_tokens=False).items():
        if number < vocab_size:
            sizes[number] = len(text) if by_bytes else _spelled(text)
    for number, token in backend.get_added_tokens_decoder().items():
        if number < vocab_size:
            spelled = len(token.content.encode()) if by_bytes else _spelled(token.content)
            sizes[number] = 0 if token.special else spelled
    return sizes


def added_bytes(tokenizer: "PreTrainedTokenizerFast", sizes: NDArray[np.int64]) -> int:
    """Bytes of the space that some tokenizers put before every text; `sizes` are those of its tokens."""
    text = "a"
    return int(sizes[tokenizer.encode(text, add_special_tokens=False)].sum()) - len(text)


def _spelled(text: str) -> int:
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return 1 if is_byte else len(text.replace("\u2581", " ").encode())


def documents(folder: Path, max_tokens: int, *, begin: int) -> list[NDArray[np.int64]]:
    """Complete held-out documents at even distances, of about `max_tokens` tokens together; at least one.

    Args:
        folder: What the data stage wrote.
        max_tokens: Wanted.
        begin: The token that a text begins with; where documents have it, it is taken off, as is their end.

    Raises:
        DataError: There are no held-out token files.
    """
    indexed, info = open_split(folder, SPLIT)
    count, total = len(indexed), info["splits"][SPLIT]["tokens"]
    wanted = max(1, min(count, round(count * max_tokens / total)))
    found = []
    for index in range(wanted):
        tokens = np.asarray(indexed[index * count // wanted], dtype=np.int64)
        start = int(len(tokens) > 1 and tokens[0] == begin)
        end = len(tokens) - int(tokens[-1] == info["end_of_document"])
        found.append(tokens[start:end])
    return found


def overlapping(tokens: Sequence[int], *, begin: int, length: int, stride: int) -> Iterator[Continuation]:
    """A document in windows of up to `length` tokens that predict up to `stride` new ones each, the first all of its.

    Args:
        tokens: Of the document; each is predicted once.
        begin: What stands before it.
        length: Tokens that the model reads at one time.
        stride: By how many a window moves on.
    """
    text = (begin, *tokens)
    done = 0
    while done < len(tokens):
        end = min(len(tokens), length if done == 0 else done + stride)
        context = text[max(0, end - length) : done + 1]
        yield Continuation(context, tuple(tokens[done:end]))
        done = end


def counts_of_windows(
    windows: WindowDataset, sizes: NDArray[np.int64], folder: Path, batch: int, *, added: int = 0
) -> tuple[list[int], Counts]:
    """Bytes of the tokens that each batch of windows predicts, and counts over all of them.

    Args:
        windows: Of the held-out split.
        sizes: Bytes by token.
        folder: Where the split lies.
        batch: Windows of a batch.
        added: Bytes before every document that are none of its own (`added_bytes`).
    """
    indexed, _ = open_split(folder, SPLIT)
    starts = np.concatenate([[0], np.cumsum(indexed.sequence_lengths)])
    per_batch = [0] * -(-len(windows) // batch)
    touched: set[int] = set()
    tokens = 0
    for index in range(len(windows)):
        item = windows[index]
        kept = item["labels"][item["loss_mask"].bool()].numpy()
        tokens += len(kept)
        first = windows.start_of(index) + 1  # the first token that is predicted
        begun = int(((starts >= first) & (starts < first + len(kept))).sum())
        per_batch[index // batch] += int(sizes[kept].sum()) - added * begun
        spread = np.searchsorted(starts, [first, first + len(kept) - 1], side="right") - 1
        touched |= set(range(int(spread[0]), int(spread[1]) + 1)) if len(kept) else set()
    return per_batch, Counts(tokens, sum(per_batch), len(touched))
