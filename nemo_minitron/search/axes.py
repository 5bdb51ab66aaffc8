"""The axes that a search may choose sizes on: those of the table, in the order in which candidates are named."""

from nemo_minitron.arch.axes import SEARCH_ORDER, Axis, PrunableAxis, row_of
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

AXES: tuple[PrunableAxis, ...] = tuple(row_of(axis) for axis in SEARCH_ORDER)
NAMES: tuple[str, ...] = tuple(row.size for row in AXES)
"""Keys of the sizes in a recipe's `target` and `search.space`, and arguments of `ModelSpec.with_sizes`."""
LAYERS, HIDDEN, FFN, HEADS, GROUPS = range(len(AXES))
"""Places of the axes."""

Sizes = tuple[int, ...]
"""A size for each axis, in the order of `AXES`; of a model with experts, in that of `EXPERT_AXES`."""

EXPERTS = len(AXES)
"""Place of the number of experts, in a model that has some."""
EXPERT_AXES: tuple[PrunableAxis, ...] = (
    *AXES[:FFN],
    row_of(Axis.EXPERT_FFN),
    *AXES[FFN + 1 :],
    row_of(Axis.EXPERT),
    row_of(Axis.SHARED_FFN),
)
"""The same for a model with experts in every layer, whose neurons stand in the place of MLPs'. The last one is left
out where there is no shared expert, so that the number of sizes tells which axes they are of."""


def axes_of(spec: ModelSpec) -> tuple[PrunableAxis, ...]:
    """The axes of a model.

    Raises:
        SpecError: It has experts, and its layers differ.
    """
    if not spec.has_experts:
        return AXES
    shared = spec.layer.moe.shared_ffn_hidden_size > 0
    return EXPERT_AXES if shared else EXPERT_AXES[:-1]


def sizes_of(spec: ModelSpec) -> Sizes:
    """The sizes of a model whose layers are all the same.

    Raises:
        SpecError: Its layers are not all attention and an MLP.
    """
    if not all(layer.is_transformer or layer.has_experts for layer in spec.layers):
        raise SpecError(
            "a search over a model with layers of several kinds",
            rule="layers of attention and an MLP each, whose counts are linear in their sizes",
            remedy="give sizes under target instead of a budget",
        )
    return tuple(spec.size(row, 0) for row in axes_of(spec))


def resized(spec: ModelSpec, sizes: Sizes) -> ModelSpec:
    """A model of other sizes."""
    return spec.with_sizes(**named(sizes))


def named(sizes: Sizes) -> dict[str, int]:
    """Sizes by their keys in a recipe."""
    return {row.size: int(size) for row, size in zip(_axes(sizes), sizes, strict=True)}


def short_name(sizes: Sizes) -> str:
    """As `L24-H512-F1408-A9-G3`."""
    return "-".join(f"{row.symbol}{size}" for row, size in zip(_axes(sizes), sizes, strict=True))


def _axes(sizes: Sizes) -> tuple[PrunableAxis, ...]:
    return AXES if len(sizes) == len(AXES) else EXPERT_AXES[: len(sizes)]


def step_of(row: PrunableAxis, size: int) -> int:
    """What sizes of an axis are multiples of, if the recipe says nothing; `size` is the teacher's."""
    width = row.coarse or 1
    while row.coarse and size // width > row.coarse:
        width *= 2
    return width
