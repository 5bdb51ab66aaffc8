"""The table of weights.

For each weight: its canonical name, the axis of each dimension, its packing and its tensor-parallel split.
Counting parameters, slicing, sharding and conversion all read this table. A new kind of weight is a new row.
Canonical form is Megatron's (Transformer Engine names), one tensor a layer, unsharded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from nemo_minitron.arch.axes import Axis, Packing
from nemo_minitron.arch.spec import LayerSpec, ModelSpec

LAYER_PREFIX = "decoder.layers.{i}."


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRow:
    """One kind of weight.

    `axes` names the axis of each dimension. A dimension of a QKV packing is marked `HEAD` and holds query heads and KV
    groups together; a dimension of a GATE_UP packing is marked `FFN` and holds each neuron twice.
    """

    name: str
    axes: tuple[Axis, ...]
    packing: Packing = Packing.PLAIN
    tensor_parallel_dim: int | None = None
    present: Callable[[ModelSpec], bool] = lambda spec: True

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{i}" in self.name


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of a certain model: a row with its layer and shape filled in."""

    name: str
    shape: tuple[int, ...]
    row: WeightRow
    layer: int | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def _biased_norm(spec: ModelSpec) -> bool:
    return spec.norm.subtracts_mean


def _gated(spec: ModelSpec) -> bool:
    return spec.activation.gated


_ATTENTION = LAYER_PREFIX + "self_attention."
_MLP = LAYER_PREFIX + "mlp."

ROWS: tuple[WeightRow, ...] = (
    WeightRow(name="embedding.word_embeddings.weight", axes=(Axis.VOCAB, Axis.HIDDEN), tensor_parallel_dim=0),
    WeightRow(name=_ATTENTION + "linear_qkv.layer_norm_weight", axes=(Axis.HIDDEN,)),
    WeightRow(name=_ATTENTION + "linear_qkv.layer_norm_bias", axes=(Axis.HIDDEN,), present=_biased_norm),
    WeightRow(
        name=_ATTENTION + "linear_qkv.weight", axes=(Axis.HEAD, Axis.HIDDEN), packing=Packing.QKV, tensor_parallel_dim=0
    ),
    WeightRow(
        name=_ATTENTION + "linear_qkv.bias",
        axes=(Axis.HEAD,),
        packing=Packing.QKV,
        tensor_parallel_dim=0,
        present=lambda spec: spec.qkv_bias,
    ),
    WeightRow(name=_ATTENTION + "q_layernorm.weight", axes=(Axis.HEAD_CHANNEL,), present=lambda spec: spec.qk_norm),
    WeightRow(name=_ATTENTION + "k_layernorm.weight", axes=(Axis.HEAD_CHANNEL,), present=lambda spec: spec.qk_norm),
    WeightRow(name=_ATTENTION + "linear_proj.weight", axes=(Axis.HIDDEN, Axis.HEAD), tensor_parallel_dim=1),
    WeightRow(name=_ATTENTION + "linear_proj.bias", axes=(Axis.HIDDEN,), present=lambda spec: spec.linear_bias),
    WeightRow(
        name=_ATTENTION + "linear_proj.post_layernorm.weight", axes=(Axis.HIDDEN,), present=lambda spec: spec.post_norms
    ),
    WeightRow(name=_MLP + "linear_fc1.layer_norm_weight", axes=(Axis.HIDDEN,)),
    WeightRow(name=_MLP + "linear_fc1.layer_norm_bias", axes=(Axis.HIDDEN,), present=_biased_norm),
    WeightRow(
        name=_MLP + "linear_fc1.weight",
        axes=(Axis.FFN, Axis.HIDDEN),
        packing=Packing.GATE_UP,
        tensor_parallel_dim=0,
        present=_gated,
    ),
    WeightRow(
        name=_MLP + "linear_fc1.weight",
        axes=(Axis.FFN, Axis.HIDDEN),
        tensor_parallel_dim=0,
        present=lambda spec: not _gated(spec),
    ),
    WeightRow(
        name=_MLP + "linear_fc1.bias",
        axes=(Axis.FFN,),
        packing=Packing.GATE_UP,
        tensor_parallel_dim=0,
        present=lambda spec: spec.linear_bias and _gated(spec),
    ),
    WeightRow(
        name=_MLP + "linear_fc1.bias",
        axes=(Axis.FFN,),
        tensor_parallel_dim=0,
        present=lambda spec: spec.linear_bias and not _gated(spec),
    ),
    WeightRow(name=_MLP + "linear_fc2.weight", axes=(Axis.HIDDEN, Axis.FFN), tensor_parallel_dim=1),
    WeightRow(name=_MLP + "linear_fc2.bias", axes=(Axis.HIDDEN,), present=lambda spec: spec.linear_bias),
    WeightRow(
        name=_MLP + "linear_fc2.post_layernorm.weight", axes=(Axis.HIDDEN,), present=lambda spec: spec.post_norms
    ),
    WeightRow(name="decoder.final_layernorm.weight", axes=(Axis.HIDDEN,)),
    WeightRow(name="decoder.final_layernorm.bias", axes=(Axis.HIDDEN,), present=_biased_norm),
    WeightRow(
        name="output_layer.weight",
        axes=(Axis.VOCAB, Axis.HIDDEN),
        tensor_parallel_dim=0,
        present=lambda spec: not spec.tied_embeddings,
    ),
)


@lru_cache(maxsize=16)
def weights(spec: ModelSpec) -> tuple[Weight, ...]:
    """Every weight of a model in canonical order: embedding, layer by layer, final norm, head."""
    rows = [row for row in ROWS if row.present(spec)]
    first = next(index for index, row in enumerate(rows) if row.per_layer)
    last = max(index for index, row in enumerate(rows) if row.per_layer)
    found = [_fill(row, spec, None) for row in rows[:first]]
    for layer in range(spec.num_layers):
        found += [_fill(row, spec, layer) for row in rows[first : last + 1]]
    found += [_fill(row, spec, None) for row in rows[last + 1 :]]
    return tuple(found)


def weight_named(spec: ModelSpec, name: str) -> Weight:
    """The weight with a canonical name.

    Raises:
        KeyError: The model has no such weight.
    """
    return _by_name(spec)[name]


@lru_cache(maxsize=16)
def _by_name(spec: ModelSpec) -> dict[str, Weight]:
    return {weight.name: weight for weight in weights(spec)}


def parameter_count(spec: ModelSpec, *, embeddings: bool = True) -> int:
    """Number of parameters; a tied embedding counts once. Without `embeddings`, the VOCAB weights are left out."""
    return sum(weight.numel for weight in weights(spec) if embeddings or Axis.VOCAB not in weight.row.axes)


def _fill(row: WeightRow, spec: ModelSpec, layer: int | None) -> Weight:
    sizes = spec.layers[0 if layer is None else layer]
    name = row.name if layer is None else row.name.format(i=layer)
    shape = tuple(_size(axis, row.packing, spec, sizes) for axis in row.axes)
    return Weight(name, shape, row, layer)


def _size(axis: Axis, packing: Packing, spec: ModelSpec, sizes: LayerSpec) -> int:
    match axis:
        case Axis.VOCAB:
            return spec.vocab_size
        case Axis.HIDDEN:
            return spec.hidden_size
        case Axis.HEAD_CHANNEL:
            return spec.head_dim
        case Axis.FFN:
            return sizes.ffn_hidden_size * (2 if packing is Packing.GATE_UP else 1)
        case Axis.HEAD:
            extra = 2 * sizes.num_query_groups if packing is Packing.QKV else 0
            return (sizes.num_attention_heads + extra) * spec.head_dim
    raise AssertionError(f"axis {axis} has no size of its own")
