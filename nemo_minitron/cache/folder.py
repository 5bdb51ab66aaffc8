"""A cache folder: `cache.json`, which says what the targets are and of which data, and shards of them."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.cache.entries import Coding, SampleTargets
from nemo_minitron.cache.shards import EncodedSample, Shard, tokens_checksum, write_shard
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.config.cache import TargetKind
from nemo_minitron.errors import CacheError

FORMAT = "nemo_minitron.target_cache"
VERSION = 1
MANIFEST = "cache.json"
_OPEN_SHARDS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheManifest:
    """What a cache is of. Two equal manifests mean the same targets, sample by sample.

    Attributes:
        kind: Sampled or top-k targets.
        width: Draws, or k.
        temperature: What the teacher's logits were divided by before drawing.
        vocab_size: The teacher's and the student's.
        samples: Samples in training order, from 0.
        sequence_length: Tokens of a sample.
        samples_per_shard: All shards but the last hold so many.
        seed: Of the draws.
        order_digest: What the samples and their order follow from (token files, length, number, seed).
        tokenizer_digest: Of the tokenizer that made the tokens.
        teacher_digest: Of the teacher's checkpoint.
    """

    kind: TargetKind
    width: int
    temperature: float
    vocab_size: int
    samples: int
    sequence_length: int
    samples_per_shard: int
    seed: int
    order_digest: str
    tokenizer_digest: str
    teacher_digest: str

    @property
    def coding(self) -> Coding:
        """How a sample becomes bytes."""
        return Coding(kind=self.kind, vocab_size=self.vocab_size, width=self.width)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.samples // self.samples_per_shard)

    def shard_samples(self, shard: int) -> range:
        """Samples of a shard."""
        first = shard * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, self.samples))

    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `cache.json`."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        with staged_file(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `cache.json`.

        Raises:
            CacheError: Missing, or not a target cache.
        """
        path = folder / MANIFEST
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT or data.pop("version") != VERSION:
                raise ValueError("another format or version")
            if set(data) != {field.name for field in fields(cls)}:
                raise ValueError(f"keys {sorted(data)}")
            return cls(**{**data, "kind": TargetKind(data["kind"])})
        except FileNotFoundError as error:
            raise CacheError(f"{folder}: no {MANIFEST}", rule="a folder that `nemo-minitron cache` wrote") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{path}: cannot be read ({error})", rule=f"{FORMAT}, version {VERSION}") from error


class CacheWriter:
    """Writes shards, each complete or not at all; what an earlier attempt left complete is kept.

    Several processes may write to one folder, each its own shards, once one of them has made it.

    Raises:
        CacheError: The folder holds another cache.
    """

    def __init__(self, folder: Path, manifest: CacheManifest) -> None:
        self.folder, self.manifest = folder, manifest
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            manifest.save(folder)
        elif (found := CacheManifest.load(folder)) != manifest:
            raise CacheError(
                f"{folder}: holds another cache ({_differences(found, manifest)})",
                rule="a folder holds one cache",
                remedy="name another folder, or delete this one",
            )

    def missing(self) -> Iterator[int]:
        """Numbers of the shards that are not there or damaged, in order."""
        for number in range(self.manifest.shards):
            try:
                _open(self.folder, self.manifest, number).check()
            except CacheError:
                yield number

    def write(self, shard: int, targets: list[SampleTargets], tokens: list[NDArray[np.int64]]) -> None:
        """Write one shard: for each of its samples in order, targets and tokens `[s]`."""
        samples = self.manifest.shard_samples(shard)
        encode = self.manifest.coding.encode
        encoded = [EncodedSample(encode(one), tokens_checksum(own)) for one, own in zip(targets, tokens, strict=True)]
        if len(encoded) != len(samples):
            raise ValueError(f"{len(encoded)} samples for shard {shard}, which has {len(samples)}")
        path = shard_path(self.folder, shard)
        write_shard(path, cache=self.manifest.digest(), first=samples.start, samples=encoded)


class TargetCache:
    """A cache open for reading, from any number of processes.

    Raises:
        CacheError: The folder holds no cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = CacheManifest.load(folder)
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def check_fits(self, **expected: Any) -> None:
        """Compare fields of the manifest with what a training run has.

        Raises:
            CacheError: Names every field that differs.
        """
        found = {name: getattr(self.manifest, name) for name in expected}
        if differing := [
            f"{name} is {found[name]}, not {value}" for name, value in expected.items() if found[name] != value
        ]:
            raise CacheError(
                f"{self.folder}: " + "; ".join(differing),
                rule="targets are of the same samples, in the same order, made with the same tokenizer",
                remedy="make the cache anew for this recipe",
            )

    def get(self, sample: int, tokens: NDArray[np.int64]) -> SampleTargets:
        """Targets of a sample, which must consist of these tokens `[s]`.

        Raises:
            CacheError: A shard is missing or damaged, or the targets are of other tokens.
        """
        if not 0 <= sample < self.manifest.samples:
            raise CacheError(f"{self.folder}: sample {sample} of {self.manifest.samples}", remedy="cache more samples")
        number = sample // self.manifest.samples_per_shard
        encoded = self._shard(number).read(sample)
        if encoded.tokens_crc != tokens_checksum(tokens):
            raise CacheError(
                f"{self.folder}: sample {sample} was made of other tokens",
                rule="the cache and the training data are of the same texts, in the same order",
                remedy="make the cache anew for this recipe",
            )
        return self.manifest.coding.decode(encoded.data, self.manifest.sequence_length)

    def check(self) -> None:
        """Look for every shard; reads headers only.

        Raises:
            CacheError: One is missing or damaged.
        """
        for number in range(self.manifest.shards):
            _open(self.folder, self.manifest, number)

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            self._open[number] = _open(self.folder, self.manifest, number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"targets-{shard:06d}.bin"


def _open(folder: Path, manifest: CacheManifest, number: int) -> Shard:
    samples = manifest.shard_samples(number)
    return Shard(shard_path(folder, number), cache=manifest.digest(), first=samples.start, count=len(samples))


def _differences(found: CacheManifest, wanted: CacheManifest) -> str:
    pairs = ((field.name, getattr(found, field.name), getattr(wanted, field.name)) for field in fields(found))
    return "; ".join(f"{name} is {old}, not {new}" for name, old, new in pairs if old != new)
