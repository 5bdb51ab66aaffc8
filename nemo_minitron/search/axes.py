"""The axes that a search may choose sizes on: one row each. Everything in this room iterates over `AXES`."""

from collections.abc import Callable
from dataclasses import dataclass

from nemo_minitron.arch.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchAxis:
    """One size of a model whose layers are all the same.

    Attributes:
        name: Key of the size in a recipe's `target` and `search.space`, and argument of `ModelSpec.with_sizes`.
        symbol: Letter in a candidate's name.
        label: For people.
        size: The size that a model has.
        step: What sizes are multiples of, if the recipe says nothing.
        default: Whether the axis is searched if the recipe says nothing; otherwise it keeps the teacher's size.
        split: Whether tensor parallelism divides it.
    """

    name: str
    symbol: str
    label: str
    size: Callable[[ModelSpec], int]
    step: Callable[[int], int]
    default: bool
    split: bool


def _fraction_of(parts: int, least: int) -> Callable[[int], int]:
    """The power of two, at least `least`, that cuts a size into `parts` or fewer steps."""

    def step(size: int) -> int:
        width = least
        while size // width > parts:
            width *= 2
        return width

    return step


def _one(size: int) -> int:
    return 1


AXES: tuple[SearchAxis, ...] = (
    SearchAxis(
        name="num_layers",
        symbol="L",
        label="layers",
        size=lambda spec: spec.num_layers,
        step=_one,
        default=True,
        split=False,
    ),
    SearchAxis(
        name="hidden_size",
        symbol="H",
        label="hidden",
        size=lambda spec: spec.hidden_size,
        step=_fraction_of(32, 32),
        default=True,
        split=False,
    ),
    SearchAxis(
        name="ffn_hidden_size",
        symbol="F",
        label="FFN",
        size=lambda spec: spec.layer.ffn_hidden_size,
        step=_fraction_of(64, 64),
        default=True,
        split=True,
    ),
    SearchAxis(
        name="num_attention_heads",
        symbol="A",
        label="heads",
        size=lambda spec: spec.layer.num_attention_heads,
        step=_one,
        default=False,
        split=True,
    ),
    SearchAxis(
        name="num_query_groups",
        symbol="G",
        label="KV groups",
        size=lambda spec: spec.layer.num_query_groups,
        step=_one,
        default=False,
        split=True,
    ),
)
NAMES: tuple[str, ...] = tuple(axis.name for axis in AXES)
HEADS, GROUPS = NAMES.index("num_attention_heads"), NAMES.index("num_query_groups")
LAYERS = NAMES.index("num_layers")

Sizes = tuple[int, ...]
"""A size for each axis, in the order of `AXES`."""


def sizes_of(spec: ModelSpec) -> Sizes:
    """The sizes of a model whose layers are all the same.

    Raises:
        SpecError: Its layers differ.
    """
    return tuple(axis.size(spec) for axis in AXES)


def resized(spec: ModelSpec, sizes: Sizes) -> ModelSpec:
    """A model of other sizes."""
    return spec.with_sizes(**named(sizes))


def named(sizes: Sizes) -> dict[str, int]:
    """Sizes by their keys in a recipe."""
    return dict(zip(NAMES, map(int, sizes), strict=True))


def short_name(sizes: Sizes) -> str:
    """As `L24-H512-F1408-A9-G3`."""
    return "-".join(f"{axis.symbol}{size}" for axis, size in zip(AXES, sizes, strict=True))
