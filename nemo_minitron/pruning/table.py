"""Sizes of two models side by side, as plain text."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean

from nemo_minitron.arch.axes import MODEL_AXES, PrunableAxis
from nemo_minitron.arch.layer import LayerSpec
from nemo_minitron.arch.sizes import ACTIVE, layer_axes
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count


def size_rows(before: ModelSpec, after: ModelSpec) -> Iterator[tuple[str, list[int], list[int]]]:
    """Name of a size and its values in both models: one value, or one for each layer that has it."""
    for row in MODEL_AXES:
        yield row.label, [before.size(row)], [after.size(row)]
    for row in layer_axes(before):
        yield row.label, *_both(before, after, partial(_size, row))
    if before.has_experts:
        yield "experts a token", *_both(before, after, lambda layer: layer.moe.top_k if layer.has_experts else 0)
    yield "parameters", [parameter_count(before)], [parameter_count(after)]
    if before.has_experts:
        yield ACTIVE, [parameter_count(before, active=True)], [parameter_count(after, active=True)]
    without = [parameter_count(spec, embeddings=False) for spec in (before, after)]
    yield "without embeddings", without[:1], without[1:]


def _size(row: PrunableAxis, layer: LayerSpec) -> int:
    return layer.size(row)


def _both(before: ModelSpec, after: ModelSpec, value: Callable[[LayerSpec], int]) -> tuple[list[int], list[int]]:
    """A value of the layers of both models that have it; [0] where none has."""
    old, new = ([found for layer in spec.layers if (found := value(layer))] or [0] for spec in (before, after))
    return old, new


def size_table(before: ModelSpec, after: ModelSpec) -> str:
    """Teacher, student and what share is kept (for sizes of layers: of their means), one line a size."""
    rows = [("", "teacher", "student", "kept")]
    rows += [
        (name, _shown(old), _shown(new), f"{fmean(new) / fmean(old):.1%}")
        for name, old, new in size_rows(before, after)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3))])
        for row in rows
    )


def _shown(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
