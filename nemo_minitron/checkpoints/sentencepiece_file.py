"""SentencePiece models (`tokenizer.model`): a protocol buffer of pieces and settings, read without its library.

Field numbers and defaults are those of `sentencepiece_model.proto`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from nemo_minitron.errors import CheckpointError


class Kind(IntEnum):
    """What a piece is; the numbers are SentencePiece's, and GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One token."""

    text: str
    score: float = 0.0
    kind: Kind = Kind.NORMAL


@dataclass(frozen=True)
class SentencePieces:
    """A SentencePiece model.

    Attributes:
        pieces: Tokens by id.
        unigram: Whether it is a unigram model; else BPE.
        byte_fallback: Whether unknown characters are spelled in bytes.
        charsmap: How characters are replaced first, compiled; b"" for not at all.
        add_dummy_prefix: Whether a text is given a space in front.
        remove_extra_whitespaces: Whether outer spaces go and inner ones are one.
        escape_whitespaces: Whether spaces become U+2581.
        ids: Of "unk", "bos", "eos" and "pad"; None for one that there is not.
    """

    pieces: tuple[Piece, ...]
    unigram: bool
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    ids: dict[str, int | None]


_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
_IDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}


def read_sentencepiece(data: bytes, *, where: str) -> SentencePieces:
    """A model from its bytes.

    Raises:
        CheckpointError: It is damaged, or of a kind that is not supported.
    """
    try:
        return _read(data, where)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: not a sound SentencePiece model ({error})", remedy="fetch it again") from error


def _read(data: bytes, where: str) -> SentencePieces:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(value))
        elif number in (2, 3) and isinstance(value, bytes):
            (trainer if number == 2 else normalizer).update(_fields(value))
    model_type = _int(trainer.get(3, _UNIGRAM))
    if not pieces or model_type not in (_UNIGRAM, _BPE):
        raise CheckpointError(
            f"{where}: a SentencePiece model of {len(pieces)} pieces, trainer_spec.model_type = "
            f"{_MODEL_TYPES.get(model_type, model_type)}",
            rule="unigram or bpe",
        )
    if _int(trainer.get(24, 0)):
        raise CheckpointError(f"{where}: trainer_spec.treat_whitespace_as_suffix = true is not supported", rule="false")
    ids = {name: _signed(_int(trainer.get(number, default))) for name, (number, default) in _IDS.items()}
    charsmap = normalizer.get(2, b"")
    return SentencePieces(
        pieces=tuple(pieces),
        unigram=model_type == _UNIGRAM,
        byte_fallback=bool(_int(trainer.get(35, 0))),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        add_dummy_prefix=bool(_int(normalizer.get(3, 1))),
        remove_extra_whitespaces=bool(_int(normalizer.get(4, 1))),
        escape_whitespaces=bool(_int(normalizer.get(5, 1))),
        ids={name: value if 0 <= value < len(pieces) else None for name, value in ids.items()},
    )


def _piece(data: int | bytes) -> Piece:
    if not isinstance(data, bytes):
        raise TypeError("a piece is a number")
    text, score, kind = "", 0.0, Kind.NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = Kind(_int(value))
    return Piece(text, float(score), kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message: numbers as they are, everything else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("truncated")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("bytes in place of a number")
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
