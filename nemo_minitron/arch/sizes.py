"""The sizes of a model by the names that tables give them."""

from nemo_minitron.arch.axes import LAYER_AXES, MODEL_AXES, PrunableAxis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count

PARAMETERS = "parameters"
ACTIVE = "active parameters"
"""Those that one token passes through."""


def named_sizes(spec: ModelSpec) -> dict[str, int]:
    """Sizes by label; those of layers are the first layer's."""
    return {
        PARAMETERS: parameter_count(spec),
        **({ACTIVE: parameter_count(spec, active=True)} if spec.has_experts else {}),
        "without embeddings": parameter_count(spec, embeddings=False),
        **cut_sizes(spec),
        "head size": spec.head_dim,
        "vocabulary": spec.vocab_size,
    }


def cut_sizes(spec: ModelSpec) -> dict[str, int]:
    """Sizes by label of the axes that can be cut; those of layers are the first one's that has the axis.

    Axes that no layer has are left out.
    """
    return {row.label: first_size(spec, row) for row in (*MODEL_AXES, *layer_axes(spec))}


def layer_axes(spec: ModelSpec) -> tuple[PrunableAxis, ...]:
    """The axes of layers that some layer of a model has."""
    return tuple(row for row in LAYER_AXES if any(layer.size(row) for layer in spec.layers))


def first_size(spec: ModelSpec, row: PrunableAxis) -> int:
    """The size of an axis in the first layer that has it; 0 if none has."""
    return next((size for index in range(spec.num_layers) if (size := spec.size(row, index))), 0)
