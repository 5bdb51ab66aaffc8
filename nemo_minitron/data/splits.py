"""Which documents are trained on, scored on and held out: decided by a hash of the text alone.

The same text lands in the same split on every machine and in every order of files, and copies of one never straddle.
"""

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.errors import DataError

if TYPE_CHECKING:  # worker processes that tokenize need no pydantic
    from nemo_minitron.config.run import DataConfig
    from nemo_minitron.data.documents import Document


_ASCII_SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f"
_SPACES = (
    _ASCII_SPACES
    + "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
"""All that `str.split` splits at, but the space itself."""


class Split(StrEnum):
    """What a document is for."""

    TRAIN = "train"
    CALIBRATION = "calibration"
    HELDOUT = "heldout"


def position(text: str, seed: int) -> float:
    """Where a text falls in [0, 1), uniformly; spaces and line ends do not matter."""
    words = _single_spaces(text).encode()
    digest = hashlib.blake2b(words, digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits, so that the quotient is exact and below 1


def _single_spaces(text: str) -> str:
    """As `" ".join(text.split())`, several times as fast: mostly there is little to replace."""
    for space in _ASCII_SPACES if text.isascii() else _SPACES:
        if space in text:
            text = text.replace(space, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


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
