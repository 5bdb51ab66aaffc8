"""Blends of Megatron token files: prefixes with weights, in every spelling that Megatron and NeMo have."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

_SPELLINGS = "[[0.7, prefix], [0.3, prefix]], [0.7, prefix, 0.3, prefix], [prefix, prefix] or prefix"


def parse_blend(value: Any) -> Any:
    """Any spelling as pairs of weight and prefix; weights are None where none are given.

    Raises:
        ValueError: It is none of the spellings, or weights are missing, not positive, or not numbers.
    """
    if value is None:
        return None
    items = _words(value)
    if items and all(isinstance(item, (list, tuple)) for item in items):
        pairs = [_pair(item) for item in items]
    elif items and all(isinstance(item, (str, int, float)) for item in items):
        pairs = _flat(items)
    else:
        raise ValueError(f"a blend is written as {_SPELLINGS}")
    if len({weight is None for weight, _ in pairs}) > 1:
        raise ValueError("weights for all prefixes, or for none")
    return tuple((weight, _without_suffix(prefix)) for weight, prefix in pairs)


def _words(value: Any) -> list[Any]:
    if isinstance(value, str):
        words = value.split()
        return words if words and _number(words[0]) is not None else [value]
    return list(value) if isinstance(value, Sequence) else []


def _pair(item: Sequence[Any]) -> tuple[float | None, str]:
    if len(item) != 2 or not isinstance(item[1], str):
        raise ValueError(f"{list(item)} is no weight and prefix; a blend is written as {_SPELLINGS}")
    return (None if item[0] is None else _weight(item[0])), item[1]


def _flat(items: list[Any]) -> list[tuple[float | None, str]]:
    if _number(items[0]) is None:
        if numbers := [item for item in items if _number(item) is not None]:
            raise ValueError(
                f"{numbers[0]} stands behind prefixes without weights; weights for all prefixes, or for none"
            )
        return [(None, str(item)) for item in items]
    if len(items) % 2:
        raise ValueError(f"{len(items)} words are no pairs of weight and prefix")
    return [(_weight(weight), str(prefix)) for weight, prefix in zip(items[::2], items[1::2], strict=True)]


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _weight(value: Any) -> float:
    number = _number(value)
    if number is None or isinstance(value, bool) or not 0 < number < float("inf"):
        raise ValueError(f"{value!r} is no weight; a number above 0")
    return number


def _without_suffix(prefix: str) -> str:
    return prefix.removesuffix(".bin").removesuffix(".idx")


Blend = Annotated[tuple[tuple[float | None, str], ...], BeforeValidator(parse_blend)]
"""Prefixes of `.bin` and `.idx` files, each with its weight or None."""
