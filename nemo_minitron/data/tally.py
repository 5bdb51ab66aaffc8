"""Counts of what was used and what was skipped, with the reason and some places, and the limit on bad documents."""

from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.errors import DataError

EMPTY = "empty"
MAX_BAD_FRACTION = 0.1
"""`data.max_bad_fraction`, where a recipe says nothing."""
PLACES = 3
"""Places that are kept for each reason."""
HOPELESS = 1000
"""When so many documents at the beginning are all bad, nobody waits for the last one."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a document is not used."""

    reason: str
    """In a few words, the same for all of a kind."""
    detail: str = ""
    """More about this one."""
    bad: bool = True
    """Whether it is one that ought to be a text, and counts against `data.max_bad_fraction`."""


@dataclass(slots=True)
class Skipped:
    """Documents that one reason cost."""

    reason: str
    bad: bool
    count: int = 0
    places: list[str] = field(default_factory=list)
    """The first few, with details."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {"reason": self.reason, "documents": self.count, "bad": self.bad, "first": list(self.places)}


class Tally:
    """Counts over some files.

    Attributes:
        documents: Those that are used.
    """

    def __init__(self) -> None:
        self.documents = 0
        self._skipped: dict[str, Skipped] = {}

    @property
    def skipped(self) -> list[Skipped]:
        """By reason, the bad ones first, then by number."""
        return sorted(self._skipped.values(), key=lambda item: (not item.bad, -item.count, item.reason))

    @property
    def bad(self) -> int:
        """Documents that ought to be texts and are not."""
        return sum(item.count for item in self._skipped.values() if item.bad)

    def skip(self, fault: Fault, place: str, count: int = 1) -> None:
        """Count documents that are not used; `place` is where the first of them is."""
        item = self._skipped.setdefault(fault.reason, Skipped(fault.reason, fault.bad))
        item.count += count
        if len(item.places) < PLACES:
            item.places.append(f"{place}: {fault.detail}" if fault.detail else place)

    def check(self, max_bad_fraction: float, key: str = "data.max_bad_fraction") -> None:
        """Refuse more bad documents than a fraction of all.

        Raises:
            DataError: Names reasons, numbers and places.
        """
        total = self.documents + sum(item.count for item in self._skipped.values())
        if self.bad > max_bad_fraction * total:
            raise self._too_many(
                total,
                f"at most {max_bad_fraction:g} of all ({key})",
                f"mend those documents, or allow more of them: {key}={_rounded_up(self.bad / total):g}",
            )

    def check_beginning(self) -> None:
        """Refuse sources whose first documents, at least a thousand, are all bad.

        Raises:
            DataError: Names reasons, numbers and places.
        """
        if not self.documents and self.bad >= HOPELESS:
            raise self._too_many(
                self.bad, "some of the first documents are texts", "look at data.sources and at data.text_key"
            )

    def _too_many(self, total: int, rule: str, remedy: str) -> DataError:
        lines = [
            f"  - {item.count:,}: {item.reason}\n" + "\n".join(f"      {place}" for place in item.places)
            for item in self.skipped
            if item.bad
        ]
        return DataError(
            f"{self.bad:,} of {total:,} documents are no texts\n" + "\n".join(lines), rule=rule, remedy=remedy
        )


def _rounded_up(fraction: float) -> float:
    return min(1.0, -(-fraction * 1000 // 1) / 1000)
