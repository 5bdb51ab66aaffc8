"""Which documents are trained on, scored on and held out: decided by a hash of the text alone.

The same text lands in the same split on every machine and in every order of files, and copies of one never straddle.
"""

import hashlib
import re
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.errors import DataError

if TYPE_CHECKING:  # worker processes that tokenize need no pydantic
    from nemo_minitron.config.run import DataConfig
    from nemo_minitron.data.documents import Document


_SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f"
    "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
"""All that `str.split` splits at, but the space itself."""
_SPACE_FOR_EACH = bytes(ord(" ") if byte < 128 and chr(byte) in _SPACES else byte for byte in range(256))
# In UTF-8, those that are no ASCII: one regex for each first byte, which the search then looks for alone.
_WIDE_SPACES = (
    (b"\xc2", re.compile(rb"\xc2[\x85\xa0]")),
    (b"\xe1", re.compile(rb"\xe1\x9a\x80")),
    (b"\xe2", re.compile(rb"\xe2(?:\x80[\x80-\x8a\xa8\xa9\xaf]|\x81\x9f)")),
    (b"\xe3", re.compile(rb"\xe3\x80\x80")),
)


class Split(StrEnum):
    """What a document is for."""

    TRAIN = "train"
    CALIBRATION = "calibration"
    HELDOUT = "heldout"


def position(text: str, seed: int) -> float:
    """Where a text falls in [0, 1), uniformly; spaces and line ends do not matter."""
    return position_of_bytes(text.encode(), seed)


def position_of_bytes(data: bytes, seed: int) -> float:
    """The same, of a text in UTF-8."""
    digest = hashlib.blake2b(_single_spaces(data), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits, so that the quotient is exact and below 1


def _single_spaces(data: bytes) -> bytes:
    """`" ".join(text.split())` of a text in UTF-8, several times as fast: mostly there is little to replace.

    No byte of a longer character is an ASCII space, and no character begins inside of another.
    """
    data = data.translate(_SPACE_FOR_EACH)
    if not data.isascii():
        for first, spaces in _WIDE_SPACES:
            if first in data:
                data = spaces.sub(b" ", data)
    while b"  " in data:
        data = data.replace(b"  ", b" ")
    return data.strip(b" ")


def split_of(document: "Document", config: "DataConfig", seed: int) -> Split:
    """The split of one document: [0, heldout), [heldout, heldout + calibration), the rest to train."""
    return _split_at(position(document.text, seed), config)


def assign(documents: Sequence["Document"], config: "DataConfig", seed: int) -> list[Split]:
    """As `assign_positions`, of documents."""
    return assign_positions([position(document.text, seed) for document in documents], config)


def splits_at(positions: NDArray[np.float64], config: "DataConfig") -> dict[Split, NDArray[np.bool_]]:
    """Which documents of a large corpus are of which split, each `[documents]`; as `split_of`, one by one."""
    heldout = positions < config.heldout_fraction
    calibration = ~heldout & (positions < config.heldout_fraction + config.calibration_fraction)
    return {Split.TRAIN: ~(heldout | calibration), Split.CALIBRATION: calibration, Split.HELDOUT: heldout}


def assign_positions(positions: Sequence[float], config: "DataConfig") -> list[Split]:
    """Splits of a complete small corpus: as `split_of`, but none that is asked for stays empty.

    An empty split takes the document whose position is nearest to its interval from a split that can spare one, so the
    result still does not depend on the order of the documents.

    Raises:
        DataError: There are fewer different documents than splits.
    """
    split_at = {at: _split_at(at, config) for at in positions}
    wanted = requested(config)
    if len(split_at) < len(wanted):
        raise DataError(
            f"data: {len(split_at)} different document(s) of at least {config.min_characters} characters",
            rule=f"at least one each for {', '.join(wanted)}",
            remedy="give more texts, lower data.min_characters, or set a fraction to 0",
        )
    middles = {
        Split.HELDOUT: config.heldout_fraction / 2,
        Split.CALIBRATION: config.heldout_fraction + config.calibration_fraction / 2,
        Split.TRAIN: (1 + config.heldout_fraction + config.calibration_fraction) / 2,
    }
    for split in wanted:
        held = list(split_at.values())
        if split not in held:
            spare = [at for at, owner in split_at.items() if held.count(owner) > 1]
            nearest = min(spare, key=lambda at: (abs(at - middles[split]), at))
            split_at[nearest] = split
    return [split_at[at] for at in positions]


def requested(config: "DataConfig") -> tuple[Split, ...]:
    """The splits whose fraction is not zero."""
    fractions = {Split.CALIBRATION: config.calibration_fraction, Split.HELDOUT: config.heldout_fraction}
    return tuple(split for split in Split if fractions.get(split, 1) > 0)


def _split_at(at: float, config: "DataConfig") -> Split:
    if at < config.heldout_fraction:
        return Split.HELDOUT
    return Split.CALIBRATION if at < config.heldout_fraction + config.calibration_fraction else Split.TRAIN
