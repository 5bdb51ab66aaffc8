"""One sample's targets as arrays and as bytes.

A token has a few entries, each a token id and a value. Sampled targets (Anshumann et al., arXiv:2503.16870) count how
often an id was drawn: id and count share one little-endian integer of as few bytes as both need, three for
vocabularies up to 2^18 and 63 draws. Top-k targets hold an fp32 log-probability an entry, and the probability of all
other ids as one fp32 number per token.

Shapes: S tokens of a sample, E entries of all of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.config.cache import TargetKind
from nemo_minitron.errors import CacheError


@dataclass(frozen=True, slots=True)
class SampleTargets:
    """Targets of one sample.

    Attributes:
        lengths: Entries of each token, `[S]` int64; 0 for a token that does not count.
        ids: Token ids, `[E]` int64; a token's entries lie together, in any order.
        values: `[E]`: counts (int64) of sampled targets, log-probabilities (fp32) of top-k ones.
        tail: Probability of all other ids, `[S]` fp32; None for sampled targets.
    """

    lengths: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.int64] | NDArray[np.float32]
    tail: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Coding:
    """How entries become bytes.

    Attributes:
        kind: What the entries are.
        vocab_size: Ids are below it.
        width: Draws per token of sampled targets, entries per token of top-k ones: no token has more.
    """

    kind: TargetKind
    vocab_size: int
    width: int

    def encode(self, targets: SampleTargets) -> bytes:
        """The bytes of one sample.

        Raises:
            CacheError: An id, a count or a number of entries is out of range.
        """
        self._check(targets)
        parts = [targets.lengths.astype(f"<u{self._length_bytes}").tobytes()]
        if self.kind is TargetKind.SAMPLED:
            packed = targets.ids.astype(np.uint64) | (targets.values.astype(np.uint64) << np.uint64(self._id_bits))
            parts.append(_narrow(packed, self._entry_bytes))
        else:
            assert targets.tail is not None  # _check has seen to it
            parts.append(_narrow(targets.ids.astype(np.uint64), self._entry_bytes))
            parts += [targets.values.astype("<f4").tobytes(), targets.tail.astype("<f4").tobytes()]
        return b"".join(parts)

    def decode(self, data: bytes | memoryview, tokens: int) -> SampleTargets:
        """The inverse of `encode`, for a sample of so many tokens.

        Raises:
            CacheError: The bytes are no such sample.
        """
        head = tokens * self._length_bytes
        if len(data) < head:
            raise CacheError(f"targets of {tokens} tokens in {len(data)} bytes", rule="the bytes of a complete sample")
        lengths = np.frombuffer(data, f"<u{self._length_bytes}", tokens).astype(np.int64)
        entries = int(lengths.sum())
        if len(data) != head + self._rest_bytes(entries, tokens):
            raise CacheError(f"{entries} entries in {len(data)} bytes", rule="the bytes of a complete sample")
        packed = _widen(np.frombuffer(data, np.uint8, entries * self._entry_bytes, head), self._entry_bytes)
        if self.kind is TargetKind.SAMPLED:
            ids = packed & np.uint64((1 << self._id_bits) - 1)
            counts = packed >> np.uint64(self._id_bits)
            targets = SampleTargets(lengths, ids.astype(np.int64), counts.astype(np.int64))
        else:
            place = head + entries * self._entry_bytes
            values = np.frombuffer(data, "<f4", entries, place)
            tail = np.frombuffer(data, "<f4", tokens, place + 4 * entries)
            targets = SampleTargets(lengths, packed.astype(np.int64), values, tail)
        self._check(targets)
        return targets

    @property
    def _id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def _entry_bytes(self) -> int:
        extra = self.width.bit_length() if self.kind is TargetKind.SAMPLED else 0
        return -(-(self._id_bits + extra) // 8)

    @property
    def _length_bytes(self) -> int:
        return next(size for size in (1, 2, 4) if self.width < 1 << 8 * size)

    def _rest_bytes(self, entries: int, tokens: int) -> int:
        floats = 0 if self.kind is TargetKind.SAMPLED else 4 * (entries + tokens)
        return entries * self._entry_bytes + floats

    def _check(self, targets: SampleTargets) -> None:
        entries = len(targets.ids)
        sampled = self.kind is TargetKind.SAMPLED
        problems = []
        if entries and not 0 <= int(targets.ids.min()) <= int(targets.ids.max()) < self.vocab_size:
            problems.append(f"token ids up to {int(targets.ids.max())} in a vocabulary of {self.vocab_size}")
        if len(targets.lengths) and not 0 <= int(targets.lengths.min()) <= int(targets.lengths.max()) <= self.width:
            problems.append(f"{int(targets.lengths.max())} entries of a token, at most {self.width}")
        if int(targets.lengths.sum()) != entries or len(targets.values) != entries:
            problems.append(f"{entries} ids, {len(targets.values)} values, lengths for {int(targets.lengths.sum())}")
        if sampled and entries and not 1 <= int(targets.values.min()) <= int(targets.values.max()) <= self.width:
            problems.append(
                f"counts of {int(targets.values.min())} to {int(targets.values.max())} in {self.width} draws"
            )
        if not sampled and (targets.tail is None or len(targets.tail) != len(targets.lengths)):
            problems.append("no tail for every token")
        if problems:
            raise CacheError("targets: " + "; ".join(problems), rule="ids, counts and lengths within the cache's sizes")


def _narrow(values: NDArray[np.uint64], size: int) -> bytes:
    """The lowest `size` bytes of each number, little-endian."""
    return values.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :size].tobytes()


def _widen(data: NDArray[np.uint8], size: int) -> NDArray[np.uint64]:
    wide = np.zeros((len(data) // size, 8), np.uint8)
    wide[:, :size] = data.reshape(-1, size)
    return wide.reshape(-1).view("<u8")
