"""The sizes of a model by the names that tables give them."""

from fractions import Fraction

from nemo_minitron.arch.axes import LAYER_AXES, MODEL_AXES, PrunableAxis
from nemo_minitron.arch.layer import count_label
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count

PARAMETERS = "parameters"
ACTIVE = "active parameters"
"""Those that one token passes through."""


def named_sizes(spec: ModelSpec) -> dict[str, int]:
    """Sizes by label; those of layers are those of the first layer that has them."""
    kinds = spec.kinds if len(spec.kinds) > 1 else {}
    return {
        PARAMETERS: parameter_count(spec),
        **({ACTIVE: parameter_count(spec, active=True)} if spec.has_experts else {}),
        "without embeddings": parameter_count(spec, embeddings=False),
        **cut_sizes(spec),
        **{count_label(kind): count for kind, count in kinds.items() if kind},
        "head size": spec.head_dim,
        "vocabulary": spec.vocab_size,
    }


def cut_sizes(spec: ModelSpec) -> dict[str, int]:
    """Sizes by label of the axes that a model has and that can be cut, as in `named_sizes`."""
    return {row.label: size for row in (*MODEL_AXES, *LAYER_AXES) if (size := spec.common_size(row))}


def layer_axes(spec: ModelSpec) -> tuple[PrunableAxis, ...]:
    """The axes of layers that some layer of a model has."""
    return tuple(row for row in LAYER_AXES if any(layer.size(row) for layer in spec.layers))


def fraction_of(size: int, fraction: float, *, step: int, maximum: int | None = None) -> int:
    """A fraction of a size as a multiple of `step`: the nearest one, halves up, and at least one step.

    Args:
        size: The teacher's.
        fraction: Between 0 and 1, taken by its decimal digits: 0.3 is three tenths, not the nearest binary fraction.
        step: What the result is a multiple of.
        maximum: Upper limit, unless it is below one step; None for `size`.
    """
    steps = int(Fraction(str(fraction)) * size / step + Fraction(1, 2))
    return max(1, min(steps, (size if maximum is None else maximum) // step)) * step
