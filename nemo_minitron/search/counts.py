"""Exact counts for millions of shapes at one time.

Every count of a model (parameters, multiplied weights, channels of keys and values) is a sum over its layers, and what
a layer of a kind adds is linear in each of its sizes, so a few values fix all of it. They are taken from the weight
table, and the rest is integer arithmetic on arrays.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch.axes import LAYER_AXES, Axis, PrunableAxis, size_divisor
from nemo_minitron.arch.layer import LayerSpec
from nemo_minitron.arch.mixing import key_channels
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.search.axes import axes_of, layer_places, layers_by_kind, place_of

IntArray = NDArray[np.int64]
Count = Callable[[ModelSpec], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Polynomial:
    """What one layer of a kind adds, linear in each size of `places`."""

    kind: str
    number: int
    """Place of the number of such layers."""
    places: tuple[int, ...]
    coefficients: Any


class ShapeCount:
    """A count of a model as a polynomial: a sum over kinds of layers of terms that are linear in each size.

    Args:
        count: The count of a model: what it has besides its layers, linear in the hidden size, and a sum over layers
            of what is linear in each of their sizes, the others held.
        teacher: What a shape has besides its sizes.
    """

    def __init__(self, count: Count, teacher: ModelSpec) -> None:
        axes = axes_of(teacher)
        numbers = layer_places(axes)
        hidden = place_of(axes, Axis.HIDDEN)
        assert hidden is not None, "every model has a hidden size"
        self._hidden = hidden
        self._layers: list[_Polynomial] = []
        for kind, layer in layers_by_kind(teacher).items():
            rows = [row for row in LAYER_AXES if layer.size(row)]
            found = {row.size: place for row in rows if (place := place_of(axes, row.axis)) is not None}
            assert len(found) == len(rows), "every axis of layers is in SEARCH_ORDER"
            values = _corners(lambda spec: _of_layers(count, spec)[1], teacher, layer, rows)
            places = (hidden, *found.values())
            self._layers.append(_Polynomial(kind=kind, number=numbers[kind], places=places, coefficients=values))
        first = next(iter(layers_by_kind(teacher).values()))
        self._outside = _corners(lambda spec: _of_layers(count, spec)[0], teacher, first, [])

    def __call__(self, sizes: Sequence[Any]) -> Any:
        """The count of every shape.

        Args:
            sizes: For each axis integers, or integer arrays that broadcast against one another.
        """
        total = _evaluate(self._outside, [sizes[self._hidden]])
        for _, count, each in self.terms(sizes):
            total = total + each * count
        return total

    def terms(self, sizes: Sequence[Any]) -> Iterator[tuple[str, Any, Any]]:
        """Kinds of layers that count, how many there are of each, and what one of them adds."""
        for term in self._layers:
            if np.any(term.coefficients):
                each = _evaluate(term.coefficients, [sizes[place] for place in term.places])
                yield term.kind, sizes[term.number], each


def _of_layers(count: Count, spec: ModelSpec) -> tuple[int, int]:
    """What a model of one layer has besides it, and what the layer adds."""
    one, two = count(spec), count(replace(spec, layers=spec.layers * 2))
    return 2 * one - two, two - one


def _corners(count: Count, teacher: ModelSpec, layer: LayerSpec, rows: Sequence[PrunableAxis]) -> Any:
    """Coefficients of a count of a model of one layer in its hidden size and its own sizes, `[2] * (1 + rows)`."""
    points = [(1, 2), *(_two_sizes(layer, row) for row in rows)]
    values = np.empty((2,) * len(points), dtype=object)
    for corner in product((0, 1), repeat=len(points)):
        hidden, *sizes = (pair[at] for pair, at in zip(points, corner, strict=True))
        form = layer.with_sizes(**{row.size: size for row, size in zip(rows, sizes, strict=True)})
        values[corner] = count(replace(teacher, hidden_size=hidden, layers=(form,)))
    for axis, (low, high) in enumerate(points):
        first, second = np.take(values, 0, axis), np.take(values, 1, axis)
        slope = (second - first) // (high - low)
        values = np.stack([first - slope * low, slope], axis)
    return values


def _two_sizes(layer: LayerSpec, row: PrunableAxis) -> tuple[int, int]:
    """Two sizes of an axis that go with those of all others: multiples of what divides it, and of experts `top_k`."""
    if row.axis is Axis.EXPERT:
        return layer.moe.top_k, layer.moe.top_k + 1
    return (1, 2) if size_divisor(row) is None else (2, 4)


def _evaluate(coefficients: Any, sizes: Sequence[Any]) -> Any:
    if not sizes:
        return coefficients
    constant = _evaluate(coefficients[0], sizes[1:])
    if not np.any(coefficients[1]):
        return constant
    return constant + _evaluate(coefficients[1], sizes[1:]) * sizes[0]


def non_embedding_parameters(spec: ModelSpec) -> int:
    """Parameters without embedding and output layer."""
    return parameter_count(spec, embeddings=False)


def active_parameters(spec: ModelSpec) -> int:
    """Parameters that one token passes through."""
    return parameter_count(spec, active=True)


def cached_positions(layers: Any, spec: ModelSpec, kind: str, length: int) -> Any:
    """Positions that all layers of a kind together hold in the KV cache.

    Local layers hold the positions of their window. Which layers of a teacher that has both will stay is not known
    before they are ranked; the count takes as many global ones as there are, which is the most it can be.

    Args:
        layers: Number of layers, an integer or an array.
        spec: The teacher.
        kind: Of layers with attention, as `search.axes.layers_by_kind` names it.
        length: Tokens of a sequence.
    """
    world = sum(not layer.local for layer in spec.layers if kind in ("", layer.kind))
    window = min(spec.sliding_window or length, length)
    return np.minimum(layers, world) * length + np.maximum(layers - world, 0) * window


def cached_keys(spec: ModelSpec, length: int) -> Callable[[Sequence[Any]], Any]:
    """Numbers that a sequence of `length` tokens leaves in the cache as keys, of shapes; values are as many."""
    channels = ShapeCount(key_channels, spec)

    def measure(sizes: Sequence[Any]) -> Any:
        return sum(each * cached_positions(count, spec, kind, length) for kind, count, each in channels.terms(sizes))

    return measure
