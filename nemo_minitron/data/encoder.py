"""Texts to token ids with the `tokenizers` library alone: a worker process needs neither torch nor transformers.

A text that spells a special token (`<|im_end|>`) stays text unless it is asked to be parsed: documents quote such
words, and what they quote is not the end of a turn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TextEncoder:
    """Ids of documents; plain data, so that it travels to other processes."""

    definition: str
    """`tokenizer.json`."""
    end: int
    """Id behind each document."""
    vocab_size: int
    """Of the model, without padding."""
    parse_special_tokens: bool = False
    """Whether a text that spells a special token becomes that token."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text as the tokenizer writes a sequence (BOS first, if it has one), then one end.

        All texts are encoded at once, on all cores that the `tokenizers` library uses.

        Raises:
            DataError: A token is outside the model's vocabulary.
        """
        if not texts:
            return []
        found: list[NDArray[np.int64]] = []
        sizes: list[int] = []
        for encoding in self._tokenizer.encode_batch_fast(list(texts)):
            ids = encoding.ids  # a new list at each access
            sizes.append(len(ids))
            if not ids or ids[-1] != self.end:
                ids.append(self.end)
            found.append(np.fromiter(ids, np.int64, len(ids)))
        everything = np.concatenate(found)
        if not self.parse_special_tokens and (spelling := self._spelling(everything, found, sizes)):
            for index in spelling:
                tokens = self._as_text(texts[index], found[index][: sizes[index]])
                found[index] = tokens if tokens[-1] == self.end else np.append(tokens, self.end)
            everything = np.concatenate(found)
        if (largest := int(everything.max())) >= self.vocab_size:
            raise self._outside(largest)
        return found

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()  # some files carry a limit from their last use
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not self.parse_special_tokens
        return tokenizer

    @cached_property
    def _special(self) -> NDArray[np.bool_]:
        """`[ids + 1]`: which are special tokens; the last place stands for all ids beyond.

        The token of unknown words is none: texts come to it without spelling it.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        model = json.loads(self.definition)["model"]
        flags = np.zeros(max([self.vocab_size, *(number + 1 for number in added)]) + 1, dtype=bool)
        for number, token in added.items():
            flags[number] = token.special and token.content != model.get("unk_token")
        if model.get("unk_id") is not None:  # Unigram names it by number
            flags[model["unk_id"]] = False
        return flags

    @cached_property
    def _around(self) -> tuple[int, int]:
        """How many ids the tokenizer puts before and behind a text."""
        return surrounding(self._tokenizer)

    def _inner(self, tokens: NDArray[np.int64]) -> slice:
        before, behind = self._around
        return slice(before, len(tokens) - behind)

    def _spelling(
        self, everything: NDArray[np.int64], rows: Sequence[NDArray[np.int64]], sizes: Sequence[int]
    ) -> list[int]:
        """Which rows hold a special token between those that the tokenizer puts around a text.

        Args:
            everything: All rows one behind the other.
            rows: Tokens of each text, and one end.
            sizes: Tokens of each without the end that is not the tokenizer's.
        """
        places = np.flatnonzero(self._special.take(everything, mode="clip"))
        starts = np.cumsum([0, *map(len, rows)])
        of = np.searchsorted(starts, places, side="right") - 1
        before, behind = self._around
        offset = places - starts[of]
        inside = (offset >= before) & (offset < np.asarray(sizes)[of] - behind)
        return [int(row) for row in np.unique(of[inside])]

    def _as_text(self, text: str, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put pieces in the place of special ids that the model of the tokenizer itself has found (Unigram does)."""
        inner = self._inner(tokens)
        ids: list[int] = list(tokens[: inner.start])
        for number in tokens[inner].tolist():
            ids += self._pieces(number) if number < len(self._special) and self._special[number] else [number]
        return np.array([*ids, *tokens[inner.stop :]], dtype=np.int64)

    def _pieces(self, number: int) -> list[int]:
        """The longest ordinary tokens that spell a special one, from left to right; itself where there are none."""
        content = self._tokenizer.id_to_token(number)
        pieces: list[int] = []
        while content:
            ids = ((size, self._tokenizer.token_to_id(content[:size])) for size in range(len(content), 0, -1))
            best = next(((size, id) for size, id in ids if id is not None and not self._special[id]), None)
            if best is None:
                return [number]
            pieces.append(best[1])
            content = content[best[0] :]
        return pieces

    def _outside(self, token: int) -> DataError:
        return DataError(
            f"tokenizer: gives token {token} ({self._tokenizer.id_to_token(token)!r})",
            rule=f"below the model's vocabulary of {self.vocab_size}",
            remedy="use the tokenizer that the model was trained with",
        )


def surrounding(tokenizer: "Tokenizer") -> tuple[int, int]:
    """How many ids a tokenizer puts before and behind a text."""
    whole, bare = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    before = next((n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare), 0)
    return before, max(len(whole) - len(bare) - before, 0)
