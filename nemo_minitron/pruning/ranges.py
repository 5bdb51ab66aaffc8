"""Ascending indices as short text: `0-12,15`."""

from collections.abc import Sequence

from nemo_minitron.errors import PlanError


def to_ranges(indices: Sequence[int]) -> str:
    """Ascending indices as comma-separated numbers and ranges; "" for none."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: str, *, size: int, what: str) -> tuple[int, ...]:
    """The inverse of `to_ranges`.

    Args:
        text: Numbers and ranges.
        size: How many units there are; larger indices are refused before anything is expanded.
        what: What the indices are of, for messages.

    Raises:
        PlanError: The text is of another form, not ascending, or out of range.
    """
    found: list[int] = []
    for item in text.split(",") if text else ():
        first, dash, last = item.partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise PlanError(f"{what}: {item!r} is not an index or a range", rule='numbers and ranges, as in "0-12,15"')
        low, high = int(first), int(last) if dash else int(first)
        if not (found[-1] if found else -1) < low <= high < size:
            raise PlanError(f"{what}: {item!r}", rule=f"ascending, each index once, all in 0..{size - 1}")
        found += range(low, high + 1)
    return tuple(found)
