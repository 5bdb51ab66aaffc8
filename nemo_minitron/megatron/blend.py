"""Existing Megatron token files as data: trained on where they lie, calibration and held-out documents copied.

Without splits of their own, documents are shared out by their place: of each prefix the first ones are trained on, then
come those of calibration, then the held-out ones, as Megatron's `split` does. The two small splits are copied into the
stage's folder, prefix by prefix in proportion to the weights and no more than `MOST_TOKENS`, so that everything that
measures on them reads them as it reads any others. Training data are neither copied nor read here.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from nemo_minitron.config.run import DataConfig
from nemo_minitron.data.merge import SplitWriter
from nemo_minitron.data.splits import Split
from nemo_minitron.errors import DataError

MOST_TOKENS = 1 << 24
"""Calibration and held-out tokens that are copied at most, of each."""

_INDEX_PIECE = 1 << 22

Pairs = Sequence[tuple[float | None, str]]


class BlendInfo(TypedDict):
    """What `data.json` says of a blend to train on."""

    prefixes: list[str]
    weights: list[float] | None
    """None for the sizes of the prefixes."""
    split: str | None
    """Fractions of training, calibration and held-out documents, as Megatron writes them; None for all to training."""


@dataclass(frozen=True)
class _Piece:
    """Documents `first` up to `stop` of one prefix."""

    prefix: str
    data: IndexedDataset
    weight: float
    first: int
    stop: int


def blend_info(config: DataConfig) -> BlendInfo:
    """The training part of a recipe's blend."""
    assert config.blend is not None, "called for blends"
    weights = [weight for weight, _ in config.blend if weight is not None]
    own = config.calibration_blend is not None or config.heldout_blend is not None
    calibration = 0.0 if config.calibration_blend is not None else config.calibration_fraction
    heldout = 0.0 if config.heldout_blend is not None else config.heldout_fraction
    shared = not own or calibration or heldout
    return BlendInfo(
        prefixes=[str(Path(prefix).expanduser().absolute()) for _, prefix in config.blend],
        weights=weights or None,
        split=f"{1 - calibration - heldout},{calibration},{heldout}" if shared else None,
    )


def write_splits(
    config: DataConfig, info: BlendInfo, folder: Path, *, dtype: str, vocab_size: int, end: int
) -> dict[str, Any]:
    """Copy calibration and held-out documents; returns `documents`, `tokens`, `bytes` and `sha256` of every split.

    `bytes` is 0: what the tokens were made from is not here. The digest of the training split is that of its index
    files, which takes no reading of the tokens.

    Raises:
        DataError: A prefix is not there or damaged, holds tokens outside the vocabulary, a split has no documents, or
            documents whose borders matter do not end with `end`, the end-of-document token.
    """
    check = _Check(vocab_size, end if config.reset_attention_mask else None)
    ranges = _ranges(info["split"])
    assert config.blend is not None, "called for blends"
    splits: dict[str, Any] = {"train": _train(_pieces(config.blend, ranges["train"]), check)}
    wanted = {
        Split.CALIBRATION: (config.calibration_blend, config.calibration_fraction),
        Split.HELDOUT: (config.heldout_blend, config.heldout_fraction),
    }
    for split, (own, fraction) in wanted.items():
        if own is None and not fraction:
            continue
        pieces = _pieces(config.blend, ranges[split]) if own is None else _pieces(own, (0.0, 1.0))
        splits[str(split)] = _copy(pieces, folder / split, str(split), dtype, check)
    return splits


def _ranges(split: str | None) -> dict[str, tuple[float, float]]:
    """Where each split begins and ends, in fractions of the documents, computed as Megatron computes it."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split or "1,0,0"))
    return dict(zip(("train", "calibration", "heldout"), [ends or (0.0, 0.0) for ends in matrix], strict=True))


def _pieces(pairs: Pairs, ends: tuple[float, float]) -> list[_Piece]:
    pieces = []
    for weight, prefix in pairs:
        data = open_prefix(prefix)
        count = len(data.sequence_lengths)
        first, stop = (round(end * float(count)) for end in ends)
        size = float(data.sequence_lengths.sum(dtype=np.int64))
        pieces.append(_Piece(prefix, data, size if weight is None else weight, first, stop))
    return pieces


def open_prefix(prefix: str) -> IndexedDataset:
    """Existing token files.

    Raises:
        DataError: One of the two is missing, cut short or of another kind.
    """
    path = str(Path(prefix).expanduser().absolute())
    try:
        with Path(f"{path}.idx").open("rb") as file:
            if file.read(9) != b"MMIDIDX\x00\x00":
                raise _bad(f"{path}.idx: is no index of Megatron's")
        data = IndexedDataset(path, mmap=True)
        dtype = np.dtype(data.index.dtype)
        if not np.issubdtype(dtype, np.integer):
            raise _bad(f"{path}.idx: holds {dtype} numbers, which are no tokens")
        _check_places(data, path, dtype.itemsize)
        expected = int(data.sequence_lengths.sum(dtype=np.int64)) * dtype.itemsize
        found = Path(f"{path}.bin").stat().st_size
    except OSError as error:
        raise _bad(f"{error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, AssertionError) as error:
        raise _bad(f"{path}.idx: {error or 'is damaged'}") from error
    if found != expected:
        raise _bad(f"{path}.bin: {found} bytes, where the index says {expected}")
    return data


def _check_places(data: IndexedDataset, path: str, itemsize: int) -> None:
    """Documents lie one behind the other, as Megatron's builder writes them; read in pieces of the index."""
    place = 0
    for first in range(0, len(data.sequence_lengths), _INDEX_PIECE):
        lengths = np.asarray(data.sequence_lengths[first : first + _INDEX_PIECE], dtype=np.int64)
        pointers = np.asarray(data.index.sequence_pointers[first : first + _INDEX_PIECE])
        ends = place + np.cumsum(lengths) * itemsize
        if lengths.min() < 0 or (pointers != ends - lengths * itemsize).any():
            raise _bad(f"{path}.idx: documents do not lie one behind the other")
        place = int(ends[-1])


def _bad(what: str) -> DataError:
    return DataError(
        what,
        rule="data.blend names prefixes of complete .bin and .idx files",
        remedy="correct the prefix, or copy again",
    )


def _train(pieces: Sequence[_Piece], check: "_Check") -> dict[str, Any]:
    documents = tokens = 0
    digest = hashlib.sha256()
    for piece in pieces:
        lengths = piece.data.sequence_lengths[piece.first : piece.stop]
        if not len(lengths):
            raise _empty("train", piece.prefix)
        documents += len(lengths)
        tokens += int(lengths.sum(dtype=np.int64))
        for index in (piece.first, piece.stop - 1):
            check(piece.data[index], piece.prefix)
        with Path(f"{Path(piece.prefix).expanduser()}.idx").open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"documents": documents, "tokens": tokens, "bytes": 0, "sha256": digest.hexdigest()}


def _copy(pieces: Sequence[_Piece], prefix: Path, name: str, dtype: str, check: "_Check") -> dict[str, Any]:
    writer = SplitWriter(prefix, dtype)
    total = sum(piece.weight for piece in pieces)
    for piece in pieces:
        most = max(1, round(MOST_TOKENS * piece.weight / total))
        before = writer.tokens
        for index in range(piece.first, piece.stop):
            if writer.tokens - before >= most:
                break
            tokens = piece.data[index]
            check(tokens, piece.prefix)
            writer.add(tokens, np.array([len(tokens)], dtype=np.int32))
    if not writer.documents:
        raise _empty(name, ", ".join(piece.prefix for piece in pieces))
    digest = writer.finish()
    return {"documents": writer.documents, "tokens": writer.tokens, "bytes": 0, "sha256": digest}


@dataclass(frozen=True)
class _Check:
    """What a document of existing token files must be.

    Attributes:
        vocab_size: The model's.
        end: Token that it must end with; None where its border does not matter.
    """

    vocab_size: int
    end: int | None

    def __call__(self, tokens: NDArray[Any], prefix: str) -> None:
        """Look at one document.

        Raises:
            DataError: It holds a token outside the vocabulary, or does not end as it must.
        """
        if not len(tokens):
            return
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            worst = int(tokens.max()) if int(tokens.max()) >= self.vocab_size else int(tokens.min())
            raise DataError(
                f"{prefix}: holds token {worst}",
                rule=f"from 0 to below the model's vocabulary of {self.vocab_size}",
                remedy="name token files that were made with the model's own tokenizer",
            )
        if self.end is not None and int(tokens[-1]) != self.end:
            raise DataError(
                f"{prefix}: a document ends with token {int(tokens[-1])} under data.reset_attention_mask",
                rule=f"borders are found by the end-of-document token, {self.end}",
                remedy="tokenize with --append-eod, or set data.reset_attention_mask=false",
            )


def _empty(split: str, prefix: str) -> DataError:
    return DataError(
        f"{prefix}: no document falls to {split}",
        rule="each split with a fraction above 0 has documents",
        remedy="give more documents, a larger fraction, or a blend of its own for this split",
    )


def blend_digest(info: BlendInfo, splits: dict[str, Any]) -> str:
    """SHA-256 of what is trained and measured on."""
    content = {
        "weights": info["weights"],
        "split": info["split"],
        "splits": {n: s["sha256"] for n, s in splits.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
