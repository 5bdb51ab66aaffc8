"""Canonical weights out of Megatron's distributed checkpoints, whatever stores them and whatever their prefix.

Layers of one size are stacked under one key, `decoder.layers.mlp.linear_fc2.weight` shaped `[layers, h, ffn]`; layers
that differ keep a key each, `decoder.layers.7.mlp.linear_fc2.weight`. Routed experts are stacked under one key in both
cases, `...mlp.experts.experts.linear_fc2.weight` shaped `[layers, experts, h, ffn]`. All are Megatron-Core's own
conventions.
"""

import re
from collections.abc import Mapping, Set
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import Weight, stored_parts, weights
from nemo_minitron.checkpoints.parts import widest
from nemo_minitron.checkpoints.torch_dist_index import Shape, StoredTensor
from nemo_minitron.errors import CheckpointError

PREFIXES = ("model.", "module.", "")
"""NeMo-1, NeMo-2, bare Megatron."""

EMBEDDING = "embedding.word_embeddings.weight"

_FINAL_NORM, _OF_HYBRIDS = "decoder.final_layernorm.", "decoder.final_norm."
"""The last norm in GPT models, and what Megatron's MambaModel calls it."""
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.")


class Weights(Protocol):
    """Weights in Megatron's names, in whatever layout they are stored.

    Attributes:
        layout: What to call that layout.
    """

    @property
    def layout(self) -> str: ...  # noqa: D102

    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        ...

    def check(self, spec: ModelSpec) -> None:
        """Compare names and shapes with those that a model has.

        Raises:
            CheckpointError: A weight is missing, unknown or of another shape.
        """
        ...

    def dtype(self, spec: ModelSpec) -> torch.dtype:
        """Type that holds every weight of the model exactly."""
        ...

    def get(self, weight: Weight, spec: ModelSpec) -> Tensor:
        """One of a model's canonical tensors in its stored type; of a padded vocabulary only the real rows."""
        ...


class Store(Protocol):
    """Complete tensors by key, of which boxes can be read."""

    label: str

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Shape and type of each tensor."""
        ...

    def read(self, key: str, *, start: Shape | None = None, stop: Shape | None = None) -> Tensor:
        """A box of a tensor, as a tensor of its own."""
        ...


class DistributedWeights:
    """Weights of a distributed checkpoint.

    Raises:
        CheckpointError: There is no word embedding among them.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.layout = str(getattr(store, "kind", "torch_dist"))
        self.prefix = self._find_prefix()
        self._keys = frozenset(store.tensors)
        self._final = _OF_HYBRIDS if f"{self.prefix}{_OF_HYBRIDS}weight" in self._keys else _FINAL_NORM
        self.stacked = not any(_LAYER.match(key.removeprefix(self.prefix)) for key in self._keys)

    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return self.store.tensors[self.prefix + EMBEDDING].shape[0]

    def check(self, spec: ModelSpec) -> None:
        """Compare names and shapes with those that a model has.

        Raises:
            CheckpointError: A weight is missing, unknown or of another shape.
        """
        label = self.store.label
        if self.stacked and not spec.is_uniform:
            raise CheckpointError(f"{label}: layers are stacked, but its configuration says they differ")
        expected = {}
        for weight in weights(spec):
            place = place_of(weight, spec, stacked=self.stacked)
            for suffix, shape in stored_parts(weight, spec).items():
                expected[self._stored(place.key) + suffix] = (weight, place.leading + shape)
        check_names(expected.keys(), self._keys, label=label)
        for key, (weight, shape) in expected.items():
            check_shape(weight, self.store.tensors[key].shape, shape, where=f"{label}: {key}")

    def dtype(self, spec: ModelSpec) -> torch.dtype:
        """Type that holds every weight of the model exactly."""
        keys = {
            self._stored(_key_of(weight, stacked=self.stacked)[0]) + suffix
            for weight in weights(spec)
            if not weight.row.fp32
            for suffix in stored_parts(weight, spec)
        }
        return widest([self.store.tensors[key].dtype for key in sorted(keys)])

    def get(self, weight: Weight, spec: ModelSpec) -> Tensor:
        """One canonical tensor in its stored type; of a stacked key only its layer is read."""
        key, offsets = _key_of(weight, stacked=self.stacked)
        found = stored_parts(weight, spec).items()
        parts = [self._read(self._stored(key) + suffix, offsets, shape) for suffix, shape in found]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stored(self, key: str) -> str:
        """A key as it is in the store."""
        return self.prefix + key.replace(_FINAL_NORM, self._final)

    def _read(self, key: str, offsets: Shape, shape: Shape) -> Tensor:
        if not offsets:
            return self.store.read(key, stop=shape)
        start = (*offsets, *(0 for _ in shape))
        stop = (*(offset + 1 for offset in offsets), *shape)
        return self.store.read(key, start=start, stop=stop).reshape(shape)

    def _find_prefix(self) -> str:
        for prefix in PREFIXES:
            if prefix + EMBEDDING in self.store.tensors:
                return prefix
        raise CheckpointError(f"{self.store.label}: has no {EMBEDDING}", rule="the weights of a GPT model")


def check_names(expected: Set[str], found: Set[str], *, label: str) -> None:
    """Compare names of weights.

    Raises:
        CheckpointError: One is missing or unknown.
    """
    if missing := sorted(expected - found):
        raise CheckpointError(f"{label}: {len(missing)} weight(s) missing, {missing[0]} first")
    if extra := sorted(found - expected):
        raise CheckpointError(
            f"{label}: {len(extra)} weight(s) that its configuration does not imply, {extra[0]} first",
            rule="no weight is left out in silence",
        )


def check_shape(weight: Weight, stored: Shape, expected: Shape, *, where: str) -> None:
    """Compare shapes; more rows than the vocabulary are padding.

    Raises:
        CheckpointError: They differ otherwise.
    """
    padded = weight.row.axes[0] is Axis.VOCAB and stored[:1] >= expected[:1]
    if stored != expected and not (padded and stored[1:] == expected[1:]):
        raise CheckpointError(f"{where} is shaped {stored}", rule=f"{expected} by its configuration")


class StoredPlace(NamedTuple):
    """Where a weight lies in a distributed checkpoint."""

    key: str
    """Without a prefix."""
    offsets: Shape
    """Its place along the axes that stand before its own: layers, experts."""
    leading: Shape
    """Sizes of those."""


def place_of(weight: Weight, spec: ModelSpec, *, stacked: bool) -> StoredPlace:
    """Where a weight lies.

    Args:
        weight: One of the model's.
        spec: The model.
        stacked: Whether layers are stacked under one key.
    """
    key, offsets = _key_of(weight, stacked=stacked)
    leading = [spec.num_layers] if weight.layer is not None and stacked else []
    if weight.layer is not None and weight.expert is not None:
        leading.append(spec.layers[weight.layer].moe.num_experts)
    return StoredPlace(key, offsets, tuple(leading))


def _key_of(weight: Weight, *, stacked: bool) -> tuple[str, Shape]:
    key = weight.name
    offsets: Shape = ()
    if weight.layer is not None and stacked:
        key, offsets = stacked_name(key), (weight.layer,)
    if weight.expert is not None:
        key, offsets = _LOCAL_EXPERT.sub(".experts.experts.", key), (*offsets, weight.expert)
    return key, offsets


def stacked_name(name: str) -> str:
    """A layer's weight name without the layer's number."""
    return _LAYER.sub("decoder.layers.", name)
