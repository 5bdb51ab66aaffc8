"""Exact counts for millions of shapes at one time.

Every count of a model (parameters, multiplied weights, channels of keys and values) is linear in each of its sizes, so
a few values fix all of it. They are taken from the weight table, and the rest is integer arithmetic on arrays.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import is_active, parameter_count, weights
from nemo_minitron.search.axes import AXES, EXPERTS, HEADS, Sizes, axes_of, resized

IntArray = NDArray[np.int64]
Count = Callable[[ModelSpec], int]


class Multilinear:
    """A count as a polynomial that is linear in each size.

    Args:
        count: The count of a model; linear in each of its sizes, the others held.
        teacher: What a shape has besides its sizes.
    """

    def __init__(self, count: Count, teacher: ModelSpec) -> None:
        # Heads are a multiple of KV groups in every one of these models, and there are `top_k` experts at least.
        axes = axes_of(teacher)
        points = [(2, 4) if index == HEADS else (1, 2) for index in range(len(axes))]
        if teacher.has_experts:
            points[EXPERTS] = (teacher.layer.moe.top_k, teacher.layer.moe.top_k + 1)
        values = np.empty((2,) * len(axes), dtype=object)
        for place in product((0, 1), repeat=len(axes)):
            sizes: Sizes = tuple(pair[at] for pair, at in zip(points, place, strict=True))
            values[place] = count(resized(teacher, sizes))
        for axis, (low, high) in enumerate(points):
            first, second = np.take(values, 0, axis), np.take(values, 1, axis)
            slope = (second - first) // (high - low)
            values = np.stack([first - slope * low, slope], axis)
        self._coefficients = values

    def __call__(self, sizes: Sequence[Any]) -> Any:
        """The count of every shape.

        Args:
            sizes: For each axis integers, or integer arrays that broadcast against one another.
        """
        return _evaluate(self._coefficients, sizes)


def _evaluate(coefficients: Any, sizes: Sequence[Any]) -> Any:
    if not sizes:
        return coefficients
    constant = _evaluate(coefficients[0], sizes[1:])
    if not np.any(coefficients[1]):
        return constant
    return constant + _evaluate(coefficients[1], sizes[1:]) * sizes[0]


def matrix_parameters(spec: ModelSpec) -> int:
    """Weights that every token is multiplied by, those of the output layer included, tied or not."""
    inner = sum(
        weight.numel
        for weight in weights(spec)
        if len(weight.shape) == 2 and Axis.VOCAB not in weight.row.axes and is_active(weight, spec)
    )
    return inner + spec.vocab_size * spec.hidden_size


def non_embedding_parameters(spec: ModelSpec) -> int:
    """Parameters without embedding and output layer."""
    return parameter_count(spec, embeddings=False)


def active_parameters(spec: ModelSpec) -> int:
    """Parameters that one token passes through."""
    return parameter_count(spec, active=True)


def query_channels(spec: ModelSpec) -> int:
    """Channels of all query heads of all layers."""
    return sum(layer.size(AXES[HEADS]) for layer in spec.layers) * spec.head_dim


def cached_positions(layers: Any, spec: ModelSpec, length: int) -> tuple[Any, Any]:
    """Positions that all layers together hold in the KV cache, of global and of local layers.

    Local layers hold the positions of their window. Which layers of a teacher that has both kinds will stay is not
    known before they are ranked; the count takes as many global ones as there are, which is the most it can be.

    Args:
        layers: Number of layers, an integer or an array.
        spec: The teacher.
        length: Tokens of a sequence.
    """
    world = sum(not layer.local for layer in spec.layers)
    window = min(spec.sliding_window or length, length)
    return np.minimum(layers, world) * length, np.maximum(layers - world, 0) * window
