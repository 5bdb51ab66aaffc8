"""Rendered conversations to tokens, where a template's markers are special and what messages say is text."""

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]

_HIDE = "\ufdd0"
"""Stands inside a special token that a message spells, until the template has been rendered. Unicode gives this and the
next two to no character, for uses like this one."""
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"
"""Around the number of a marker, in texts that have both kinds."""


class ChatText:
    """How one tokenizer reads rendered conversations.

    Args:
        tokenizer: The model's own.
        parse_special_tokens: Whether a message that spells a special token has that token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, parse_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._parse = parse_special_tokens

    def hidden(
        self, messages: list[dict[str, Any]], variables: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The same, with a character inside each special token that their texts spell.

        Raises:
            ValueError: A text holds such a character itself.
        """
        if self._parse or self._spelled is None:
            return messages, variables
        return self._hide(messages), self._hide(variables)

    def encode(self, rendered: str, spans: list[Span]) -> tuple[list[int], NDArray[np.int64], list[Span]]:
        """Ids, their offsets `[n, 2]`, and the spans in terms of these offsets."""
        if self._parse or _HIDE not in rendered:
            encoding = self._tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
            return encoding["input_ids"], np.array(encoding["offset_mapping"]).reshape(-1, 2), spans
        text, moved = self._with_aliases(rendered)
        found = self._alias_tokenizer.encode(text, add_special_tokens=False)
        ids = [self._alias_ids.get(number, number) for number in found.ids]
        offsets = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        return ids, offsets, [(moved(first), moved(last)) for first, last in spans]

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            assert self._spelled is not None
            if not value.isascii() and (odd := {_HIDE, _OPEN, _CLOSE} & set(value)):
                raise ValueError(f"a text holds {min(odd)!a}, which Unicode gives to no character")
            return self._spelled.sub(lambda found: found[0][0] + _HIDE + found[0][1:], value)
        if isinstance(value, dict):
            return {key: self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list) else value

    def _with_aliases(self, rendered: str) -> tuple[str, Any]:
        """The text with a name for each marker and without hiding characters, and how positions have moved."""
        assert self._spelled is not None
        pieces: list[str] = []
        old, new = [0], [0]
        last = 0
        for found in re.finditer(f"{_HIDE}|{self._spelled.pattern}", rendered):
            alias = "" if found[0] == _HIDE else _alias(self._markers.index(found[0]))
            pieces += [rendered[last : found.start()], alias]
            last = found.end()
            old.append(last)
            new.append(sum(map(len, pieces[-2:])) + new[-1])
        pieces.append(rendered[last:])

        def moved(position: int) -> int:
            index = int(np.searchsorted(old, position, side="right")) - 1
            return new[index] + position - old[index]

        return "".join(pieces), moved

    @cached_property
    def _markers(self) -> list[str]:
        """Special tokens, longer ones first; one of a single character cannot be hidden."""
        added = self._tokenizer.added_tokens_decoder.values()
        contents = {token.content for token in added if token.special and len(token.content) > 1}
        return sorted(contents, key=lambda content: (-len(content), content))

    @cached_property
    def _spelled(self) -> "re.Pattern[str] | None":
        return re.compile("|".join(map(re.escape, self._markers))) if self._markers else None

    @cached_property
    def _alias_tokenizer(self) -> "Tokenizer":
        """A copy that takes special tokens for text, and reads each marker's alias as a token of its own."""
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        strips = {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}
        copy.add_tokens(
            [
                AddedToken(
                    _alias(number),
                    special=False,
                    normalized=False,
                    lstrip=strips[content].lstrip,
                    rstrip=strips[content].rstrip,
                )
                for number, content in enumerate(self._markers)
            ]
        )
        return copy

    @cached_property
    def _alias_ids(self) -> dict[int, int]:
        """From the id of an alias to that of its marker."""
        aliases = self._alias_tokenizer
        names = {content: aliases.token_to_id(_alias(number)) for number, content in enumerate(self._markers)}
        ids = {content: aliases.token_to_id(content) for content in self._markers}
        return {names[content]: ids[content] for content in self._markers}  # type: ignore[misc]  # both are there


def _alias(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"
