"""Which calibration samples scores rest on, so that no sample is counted twice when files are merged."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from nemo_minitron.errors import ScoresError

Range = tuple[int, int]
"""First sample, and the one behind the last."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Samples of one calibration set.

    Attributes:
        data_digest: Of the token files.
        sequence_length: Tokens of a sample; sample `i` begins with token `i * sequence_length` of the set.
        ranges: Which samples, ascending and apart.
    """

    data_digest: str
    sequence_length: int
    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, data_digest: str, sequence_length: int, first: int, samples: int) -> Self:
        """`samples` consecutive samples from `first` on."""
        return cls(data_digest, sequence_length, ((first, first + samples),))

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        ranges = [list(span) for span in self.ranges]
        return {"data_digest": self.data_digest, "sequence_length": self.sequence_length, "samples": ranges}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        ranges = tuple((int(first), int(end)) for first, end in data["samples"])
        return cls(str(data["data_digest"]), int(data["sequence_length"]), ranges)

    def __str__(self) -> str:
        spans = ", ".join(f"{first}-{end - 1}" for first, end in self.ranges)
        return f"samples {spans} of {self.sequence_length} tokens (data {self.data_digest[:12]})"


def read_coverage(provenance: Mapping[str, Any]) -> tuple[Coverage, ...]:
    """What a score file says it rests on; empty when it does not say.

    Raises:
        ScoresError: It says so in a way that makes no sense.
    """
    try:
        return tuple(Coverage.from_dict(item) for item in provenance.get("calibration", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ScoresError(f"provenance: calibration = {provenance['calibration']!r}") from error


def united(parts: Iterable[Coverage]) -> tuple[Coverage, ...]:
    """All samples together, in order of data digest; neighbouring ranges become one.

    Raises:
        ScoresError: A sample is there twice, or samples of one set differ in length.
    """
    sets: dict[str, list[Coverage]] = {}
    for part in parts:
        sets.setdefault(part.data_digest, []).append(part)
    lengths = sorted({part.sequence_length for found in sets.values() for part in found})
    if len(lengths) > 1:
        raise ScoresError(
            f"scores over samples of {' and '.join(map(str, lengths))} tokens",
            rule="samples that are summed up have one length",
            remedy="score with one score.sequence_length",
        )
    return tuple(
        Coverage(digest, lengths[0], _joined(digest, [span for part in sets[digest] for span in part.ranges]))
        for digest in sorted(sets)
    )


def _joined(digest: str, ranges: list[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for first, end in sorted(ranges):
        if joined and first < joined[-1][1]:
            raise ScoresError(
                f"scores overlap: samples {first}-{min(end, joined[-1][1]) - 1} of data {digest[:12]} are in both",
                rule="every calibration sample counts once",
                remedy="score other samples (score.first_sample), or merge other files",
            )
        if joined and first == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return tuple(joined)
