"""The axes that a search may choose sizes on: those of the table that a model has, and the layers of each kind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from nemo_minitron.arch.axes import SEARCH_ORDER, Axis, PrunableAxis, row_of, size_divisor
from nemo_minitron.arch.layer import LayerSpec, count_key, count_label
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

Sizes = tuple[int, ...]
"""A size for each axis of a model, in the order of `axes_of`."""

_SYMBOLS = {
    **{"mamba": "LM", "attention": "LA", "mlp": "LF", "moe": "LX"},
    **{"mamba_dense": "LMD", "dense": "LD", "expert": "LE"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchAxis:
    """An axis whose size a search may choose.

    Attributes:
        row: Its row of the table.
        kind: Of layers, in a model that has several kinds, each of which is an axis of its own; "" for any other axis.
    """

    row: PrunableAxis
    kind: str = ""

    @property
    def key(self) -> str:
        """What it is called in a recipe's `target` and `search.space`."""
        return count_key(self.kind) if self.kind else self.row.size

    @property
    def label(self) -> str:
        """What tables call its size."""
        return count_label(self.kind) if self.kind else self.row.label

    @property
    def symbol(self) -> str:
        """A letter or two for it in names of candidates."""
        return _SYMBOLS[self.kind] if self.kind else self.row.symbol

    @property
    def is_layers(self) -> bool:
        """Whether its size counts layers."""
        return self.row.axis is Axis.LAYER


@lru_cache(maxsize=16)
def layers_by_kind(spec: ModelSpec) -> dict[str, LayerSpec]:
    """A layer of each kind, by the kind's name, or by "" where there is one kind; all layers of a kind are alike.

    They may differ in what their queries see: here, none is local.

    Raises:
        SpecError: Layers of one kind differ, or are of a kind that no recipe can count.
    """
    found: dict[str, LayerSpec] = {}
    differ: set[str] = set()
    for layer in spec.layers:
        seen = layer.looking_back(local=False) if layer.local else layer
        if found.setdefault(layer.kind, seen) != seen:
            differ.add(layer.described)
    if differ or (len(found) > 1 and "" in found):
        told = " and of ".join(sorted(differ)) if differ else found[""].described
        raise SpecError(
            f"a search over a model whose layers of {told} {'differ' if differ else 'stand beside others'}",
            rule="layers of one kind are alike, and kinds are Mamba, attention, an MLP or experts alone, Mamba or "
            "attention and an MLP, attention and experts",
            remedy="give sizes under target instead of a budget",
        )
    if len(found) == 1:
        return {"": next(iter(found.values()))}
    return {kind: found[kind] for kind in spec.kinds}


@lru_cache(maxsize=16)
def axes_of(spec: ModelSpec) -> tuple[SearchAxis, ...]:
    """The axes of a model, in the order in which candidates are named.

    Raises:
        SpecError: Its layers cannot be searched over; see `layers_by_kind`.
    """
    layers = layers_by_kind(spec)
    rows = [row_of(axis) for axis in SEARCH_ORDER]
    counts = [SearchAxis(row=row, kind=kind) for row in rows if row.axis is Axis.LAYER for kind in layers]
    others = [SearchAxis(row=row) for row in rows if row.axis is not Axis.LAYER and spec.common_size(row)]
    return (*counts, *others)


def place_of(axes: Sequence[SearchAxis], axis: Axis) -> int | None:
    """Where an axis of the table other than layers stands among those of a model; None if it has none."""
    return next((place for place, each in enumerate(axes) if each.row.axis is axis and not each.is_layers), None)


def layer_places(axes: Sequence[SearchAxis]) -> dict[str, int]:
    """Where the numbers of layers stand, by kind; by "" where there is one kind."""
    return {each.kind: place for place, each in enumerate(axes) if each.is_layers}


def nested_places(axes: Sequence[SearchAxis]) -> tuple[tuple[int, int], ...]:
    """Pairs of places of which the first one's size is a multiple of the second one's, as heads of KV groups."""
    outer = {place: size_divisor(each.row) for place, each in enumerate(axes)}
    found = ((place, place_of(axes, row.axis)) for place, row in outer.items() if row is not None)
    return tuple((inner, place) for inner, place in found if place is not None)


def sizes_of(spec: ModelSpec) -> Sizes:
    """The sizes of a model along its own axes.

    Raises:
        SpecError: Its layers cannot be searched over; see `layers_by_kind`.
    """
    counts = {"": spec.num_layers, **spec.kinds}
    return tuple(counts[axis.kind] if axis.is_layers else spec.common_size(axis.row) for axis in axes_of(spec))


def resized(spec: ModelSpec, sizes: Sizes) -> ModelSpec:
    """A model of other sizes; of each kind of layers the first ones, whichever will really stay."""
    axes = axes_of(spec)
    wanted = named(axes, sizes)
    if len(layer_places(axes)) > 1:
        left = {axis.kind: wanted.pop(axis.key) for axis in axes if axis.is_layers}
        layers = []
        for layer in spec.layers:
            if left[layer.kind] > 0:
                layers.append(layer)
                left[layer.kind] -= 1
        spec = replace(spec, layers=tuple(layers))
    return spec.with_sizes(**wanted)


def named(axes: Sequence[SearchAxis], sizes: Sequence[int]) -> dict[str, int]:
    """Sizes by their keys in a recipe."""
    return {axis.key: int(size) for axis, size in zip(axes, sizes, strict=True)}


def short_name(axes: Sequence[SearchAxis], sizes: Sequence[int]) -> str:
    """As `L24-H512-F1408-A9-G3`."""
    return "-".join(f"{axis.symbol}{size}" for axis, size in zip(axes, sizes, strict=True))


def step_of(row: PrunableAxis, size: int) -> int:
    """What sizes of an axis are multiples of, if the recipe says nothing; `size` is the teacher's."""
    width = row.coarse or 1
    while row.coarse and size // width > row.coarse:
        width *= 2
    return width
