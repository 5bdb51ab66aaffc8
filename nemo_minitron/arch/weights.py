"""The table of weights.

For each weight: its canonical name, the axis of each dimension, its packing and its tensor-parallel split.
Counting parameters, slicing, sharding and conversion all read this table. A new kind of weight is a new row.
Canonical form is Megatron's (Transformer Engine names), one tensor per layer, unsharded.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from nemo_minitron.arch.axes import Axis, Packing
from nemo_minitron.arch.layer import Attention, FeedForward, LayerSpec, Mamba, Mixer, Mlp, Moe
from nemo_minitron.arch.spec import ModelSpec

LAYER_PREFIX = "decoder.layers.{i}."


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRow:
    """One kind of weight.

    `axes` names the axis of each dimension; one marked `HEAD` or `KV_GROUP` holds `head_dim` channels of each unit. A
    dimension of a QKV packing is marked `HEAD` and holds query heads and KV groups together; a dimension of a GATE_UP
    packing is marked `FFN` (of experts: `EXPERT_FFN`, `SHARED_FFN`) and holds each neuron twice. A dimension marked
    `MAMBA_CHANNEL` holds the channels of every Mamba head, or, in a packing, all of its parts.
    """

    name: str
    axes: tuple[Axis, ...]
    packing: Packing = Packing.PLAIN
    tensor_parallel_dim: int | None = None
    part: type[Mixer | FeedForward] | None = None
    """The kind of mixer or feed-forward that it belongs to; None for a weight outside the layers."""
    when: Callable[[ModelSpec], bool] = lambda spec: True
    """Whether models with such traits have it."""
    layer_when: Callable[[LayerSpec], bool] = lambda layer: True
    """Whether layers with such traits have it, among those that have the part."""
    per_expert: bool = False
    """Whether every routed expert of a layer has one."""
    fp32: bool = False
    """Whether it is fp32 in a model of any dtype."""

    @property
    def per_layer(self) -> bool:
        """Whether it belongs to a layer."""
        return self.part is not None

    def present(self, spec: ModelSpec, layer: LayerSpec | None = None) -> bool:
        """Whether a model has it; for a weight of layers, whether that layer of the model has it."""
        if self.part is None:
            return self.when(spec)
        has_part = layer is not None and any(isinstance(part, self.part) for part in layer.parts)
        return has_part and self.when(spec) and layer is not None and self.layer_when(layer)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of a certain model: a row with its layer and shape filled in."""

    name: str
    shape: tuple[int, ...]
    row: WeightRow
    layer: int | None
    expert: int | None = None

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
_MAMBA = LAYER_PREFIX + "mixer."
_EXPERT = _MLP + "experts.local_experts.{e}."
_SHARED = _MLP + "shared_experts."


def _has_shared(layer: LayerSpec) -> bool:
    return layer.moe.shared_ffn_hidden_size > 0


def _fc1(name: str, part: type[FeedForward], axis: Axis, **more: Any) -> tuple[WeightRow, WeightRow]:
    """The first matrix of an MLP, gated or not."""
    common: dict[str, Any] = {"name": name, "part": part, "axes": (axis, Axis.HIDDEN), "tensor_parallel_dim": 0, **more}
    return (
        WeightRow(packing=Packing.GATE_UP, when=_gated, **common),
        WeightRow(when=lambda spec: not _gated(spec), **common),
    )


def _fc2(name: str, part: type[FeedForward], axis: Axis, **more: Any) -> WeightRow:
    """The second matrix of an MLP."""
    return WeightRow(name=name, part=part, axes=(Axis.HIDDEN, axis), tensor_parallel_dim=1, **more)


def _head_norm(name: str, heads: Axis) -> tuple[WeightRow, WeightRow]:
    """The norm of queries or keys: one weight that all heads share, or one for the channels of all of them."""
    common: dict[str, Any] = {"name": _ATTENTION + name, "part": Attention}
    return (
        WeightRow(axes=(Axis.HEAD_CHANNEL,), when=lambda spec: spec.norms_each_head, **common),
        WeightRow(axes=(heads,), tensor_parallel_dim=0, when=lambda spec: spec.full_width_qk_norm, **common),
    )


_EXPERT_ROWS: tuple[WeightRow, ...] = (
    WeightRow(name=LAYER_PREFIX + "pre_mlp_layernorm.weight", part=Moe, axes=(Axis.HIDDEN,)),
    WeightRow(name=LAYER_PREFIX + "pre_mlp_layernorm.bias", part=Moe, axes=(Axis.HIDDEN,), when=_biased_norm),
    WeightRow(name=_MLP + "router.weight", part=Moe, axes=(Axis.EXPERT, Axis.HIDDEN)),
    WeightRow(
        name=_MLP + "router.expert_bias",
        part=Moe,
        axes=(Axis.EXPERT,),
        layer_when=lambda layer: layer.moe.correction_bias,
        fp32=True,
    ),
    *_fc1(_EXPERT + "linear_fc1.weight", Moe, Axis.EXPERT_FFN, per_expert=True),
    _fc2(_EXPERT + "linear_fc2.weight", Moe, Axis.EXPERT_FFN, per_expert=True),
    *_fc1(_SHARED + "linear_fc1.weight", Moe, Axis.SHARED_FFN, layer_when=_has_shared),
    _fc2(_SHARED + "linear_fc2.weight", Moe, Axis.SHARED_FFN, layer_when=_has_shared),
    WeightRow(
        name=_SHARED + "gate_weight",
        part=Moe,
        axes=(Axis.SINGLE, Axis.HIDDEN),
        layer_when=lambda layer: layer.moe.shared_gate,
    ),
)

ROWS: tuple[WeightRow, ...] = (
    WeightRow(name="embedding.word_embeddings.weight", axes=(Axis.VOCAB, Axis.HIDDEN), tensor_parallel_dim=0),
    WeightRow(name=_ATTENTION + "linear_qkv.layer_norm_weight", part=Attention, axes=(Axis.HIDDEN,)),
    WeightRow(name=_ATTENTION + "linear_qkv.layer_norm_bias", part=Attention, axes=(Axis.HIDDEN,), when=_biased_norm),
    WeightRow(
        name=_ATTENTION + "linear_qkv.weight",
        part=Attention,
        axes=(Axis.HEAD, Axis.HIDDEN),
        packing=Packing.QKV,
        tensor_parallel_dim=0,
    ),
    WeightRow(
        name=_ATTENTION + "linear_qkv.bias",
        part=Attention,
        axes=(Axis.HEAD,),
        packing=Packing.QKV,
        tensor_parallel_dim=0,
        when=lambda spec: spec.qkv_bias,
    ),
    *_head_norm("q_layernorm.weight", Axis.HEAD),
    *_head_norm("k_layernorm.weight", Axis.KV_GROUP),
    WeightRow(
        name=_ATTENTION + "linear_proj.weight", part=Attention, axes=(Axis.HIDDEN, Axis.HEAD), tensor_parallel_dim=1
    ),
    WeightRow(
        name=_ATTENTION + "linear_proj.bias", part=Attention, axes=(Axis.HIDDEN,), when=lambda spec: spec.linear_bias
    ),
    WeightRow(
        name=_ATTENTION + "linear_proj.post_layernorm.weight",
        part=Attention,
        axes=(Axis.HIDDEN,),
        when=lambda spec: spec.post_norms,
    ),
    WeightRow(name=_MAMBA + "in_proj.layer_norm_weight", part=Mamba, axes=(Axis.HIDDEN,)),
    WeightRow(name=_MAMBA + "in_proj.layer_norm_bias", part=Mamba, axes=(Axis.HIDDEN,), when=_biased_norm),
    WeightRow(
        name=_MAMBA + "in_proj.weight",
        part=Mamba,
        axes=(Axis.MAMBA_CHANNEL, Axis.HIDDEN),
        packing=Packing.MAMBA_IN,
        tensor_parallel_dim=0,
    ),
    WeightRow(
        name=_MAMBA + "conv1d.weight",
        part=Mamba,
        axes=(Axis.MAMBA_CHANNEL, Axis.SINGLE, Axis.MAMBA_TAP),
        packing=Packing.MAMBA_CONV,
        tensor_parallel_dim=0,
    ),
    WeightRow(
        name=_MAMBA + "conv1d.bias",
        part=Mamba,
        axes=(Axis.MAMBA_CHANNEL,),
        packing=Packing.MAMBA_CONV,
        tensor_parallel_dim=0,
        layer_when=lambda layer: layer.mamba.conv_bias,
    ),
    WeightRow(name=_MAMBA + "dt_bias", part=Mamba, axes=(Axis.MAMBA_HEAD,), tensor_parallel_dim=0),
    WeightRow(name=_MAMBA + "A_log", part=Mamba, axes=(Axis.MAMBA_HEAD,), tensor_parallel_dim=0),
    WeightRow(name=_MAMBA + "D", part=Mamba, axes=(Axis.MAMBA_HEAD,), tensor_parallel_dim=0),
    WeightRow(name=_MAMBA + "norm.weight", part=Mamba, axes=(Axis.MAMBA_CHANNEL,), tensor_parallel_dim=0),
    WeightRow(
        name=_MAMBA + "out_proj.weight",
        part=Mamba,
        axes=(Axis.HIDDEN, Axis.MAMBA_CHANNEL),
        tensor_parallel_dim=1,
    ),
    WeightRow(name=_MLP + "linear_fc1.layer_norm_weight", part=Mlp, axes=(Axis.HIDDEN,)),
    WeightRow(name=_MLP + "linear_fc1.layer_norm_bias", part=Mlp, axes=(Axis.HIDDEN,), when=_biased_norm),
    WeightRow(
        name=_MLP + "linear_fc1.weight",
        part=Mlp,
        axes=(Axis.FFN, Axis.HIDDEN),
        packing=Packing.GATE_UP,
        tensor_parallel_dim=0,
        when=_gated,
    ),
    WeightRow(
        name=_MLP + "linear_fc1.weight",
        part=Mlp,
        axes=(Axis.FFN, Axis.HIDDEN),
        tensor_parallel_dim=0,
        when=lambda spec: not _gated(spec),
    ),
    WeightRow(
        name=_MLP + "linear_fc1.bias",
        part=Mlp,
        axes=(Axis.FFN,),
        packing=Packing.GATE_UP,
        tensor_parallel_dim=0,
        when=lambda spec: spec.linear_bias and _gated(spec),
    ),
    WeightRow(
        name=_MLP + "linear_fc1.bias",
        part=Mlp,
        axes=(Axis.FFN,),
        tensor_parallel_dim=0,
        when=lambda spec: spec.linear_bias and not _gated(spec),
    ),
    WeightRow(name=_MLP + "linear_fc2.weight", part=Mlp, axes=(Axis.HIDDEN, Axis.FFN), tensor_parallel_dim=1),
    WeightRow(name=_MLP + "linear_fc2.bias", part=Mlp, axes=(Axis.HIDDEN,), when=lambda spec: spec.linear_bias),
    WeightRow(
        name=_MLP + "linear_fc2.post_layernorm.weight", part=Mlp, axes=(Axis.HIDDEN,), when=lambda spec: spec.post_norms
    ),
    *_EXPERT_ROWS,
    WeightRow(name="decoder.final_layernorm.weight", axes=(Axis.HIDDEN,)),
    WeightRow(name="decoder.final_layernorm.bias", axes=(Axis.HIDDEN,), when=_biased_norm),
    WeightRow(
        name="output_layer.weight",
        axes=(Axis.VOCAB, Axis.HIDDEN),
        tensor_parallel_dim=0,
        when=lambda spec: not spec.tied_embeddings,
    ),
)


MAMBA_PARTS: dict[Packing, tuple[str, ...]] = {
    Packing.MAMBA_IN: ("z", "x", "B", "C", "dt"),
    Packing.MAMBA_CONV: ("x", "B", "C"),
}
"""Parts of packings by their letters (`Mamba.parts`), in order."""


@lru_cache(maxsize=16)
def weights(spec: ModelSpec) -> tuple[Weight, ...]:
    """Every weight of a model in canonical order: embedding, layer by layer, final norm, head."""
    first = next(index for index, row in enumerate(ROWS) if row.per_layer)
    last = max(index for index, row in enumerate(ROWS) if row.per_layer)
    found = [_fill(row, spec, None) for row in ROWS[:first] if row.present(spec)]
    for index, layer in enumerate(spec.layers):
        found += _of_layer([row for row in ROWS[first : last + 1] if row.present(spec, layer)], spec, index)
    found += [_fill(row, spec, None) for row in ROWS[last + 1 :] if row.present(spec)]
    return tuple(found)


def _of_layer(rows: list[WeightRow], spec: ModelSpec, layer: int) -> Iterator[Weight]:
    """A layer's weights; those of experts one expert after the other."""
    for per_expert, alike in groupby(rows, key=lambda row: row.per_expert):
        same = list(alike)
        if per_expert:
            experts = range(spec.layers[layer].moe.num_experts)
            yield from (_fill(row, spec, layer, expert) for expert in experts for row in same)
        else:
            yield from (_fill(row, spec, layer) for row in same)


def weight_named(spec: ModelSpec, name: str) -> Weight:
    """The weight with a canonical name.

    Raises:
        KeyError: The model has no such weight.
    """
    return _by_name(spec)[name]


@lru_cache(maxsize=16)
def _by_name(spec: ModelSpec) -> dict[str, Weight]:
    return {weight.name: weight for weight in weights(spec)}


def parameter_count(spec: ModelSpec, *, embeddings: bool = True, active: bool = False) -> int:
    """Number of parameters; a tied embedding counts once.

    Args:
        spec: The architecture.
        embeddings: Whether the VOCAB weights count.
        active: Whether to count only those that one token passes through: of routed experts `top_k`.
    """
    return sum(
        weight.numel
        for weight in weights(spec)
        if (embeddings or Axis.VOCAB not in weight.row.axes) and not (active and not is_active(weight, spec))
    )


def matrix_count(spec: ModelSpec, layers: Container[int] | None = None, *, output_layer: bool = True) -> int:
    """Number of elements of the matrices that a token is multiplied by: two operations each.

    An embedding is looked up, not multiplied; an output layer is multiplied, tied or not. Of routed experts a token
    meets `top_k`. Convolutions are no matrices.

    Args:
        spec: The architecture.
        layers: Which layers count; None for all.
        output_layer: Whether the output layer counts.
    """
    inner = sum(
        weight.numel
        for weight in weights(spec)
        if len(weight.shape) == 2
        and weight.layer is not None
        and (layers is None or weight.layer in layers)
        and is_active(weight, spec)
    )
    return inner + (spec.vocab_size * spec.hidden_size if output_layer else 0)


def feed_forward_count(spec: ModelSpec) -> int:
    """Number of parameters that belong to neurons of MLPs and that one token passes through."""
    neurons = {Axis.FFN, Axis.EXPERT_FFN, Axis.SHARED_FFN}
    return sum(w.numel for w in weights(spec) if neurons & set(w.row.axes) and is_active(w, spec))


def is_active(weight: Weight, spec: ModelSpec) -> bool:
    """Whether a token passes through a weight, if it is routed to the first experts."""
    if weight.expert is None or weight.layer is None:
        return True
    return weight.expert < spec.layers[weight.layer].moe.top_k


def part_shapes(weight: Weight, spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """Shapes of a weight's parts in packing order (q, k, v; gate, up; z, x, B, C, dt); one shape for a plain weight."""
    rest = weight.shape[1:]
    match weight.row.packing:
        case Packing.PLAIN:
            return (weight.shape,)
        case Packing.QKV:
            key = packed_groups(weight, spec) * spec.head_dim
            return (weight.shape[0] - 2 * key, *rest), (key, *rest), (key, *rest)
        case Packing.GATE_UP:
            return ((weight.shape[0] // 2, *rest),) * 2
        case Packing.MAMBA_IN | Packing.MAMBA_CONV:
            return tuple((rows, *rest) for rows in mamba_parts(weight, spec).values())


def mamba_parts(weight: Weight, spec: ModelSpec) -> dict[str, int]:
    """Rows of each part of a Mamba packing, by its letters, in order; {} for a weight of another packing."""
    if weight.row.packing not in MAMBA_PARTS or weight.layer is None:
        return {}
    return _mamba_rows(weight.row.packing, spec.layers[weight.layer].mamba)


def stored_parts(weight: Weight, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that Megatron's distributed checkpoints hold of a weight, by what follows its name.

    They keep the parts of a Mamba packing apart, as `.z`, `.x` and so on; any other weight is one tensor.
    """
    if parts := mamba_parts(weight, spec):
        return {f".{letters}": (rows, *weight.shape[1:]) for letters, rows in parts.items()}
    return {"": weight.shape}


def _mamba_rows(packing: Packing, mamba: Mamba) -> dict[str, int]:
    rows = mamba.parts()
    return {letters: rows[letters] for letters in MAMBA_PARTS[packing]}


def packed_groups(weight: Weight, spec: ModelSpec) -> int:
    """KV groups that the rows of a QKV packing are grouped by."""
    if weight.layer is None:
        raise AssertionError(f"{weight.name} is packed but belongs to no layer")
    return spec.layers[weight.layer].attention.num_query_groups


def _fill(row: WeightRow, spec: ModelSpec, layer: int | None, expert: int | None = None) -> Weight:
    name = row.name if layer is None else row.name.format(i=layer, e=expert)
    sizes = None if layer is None else spec.layers[layer]
    shape = tuple(_size(axis, row.packing, spec, sizes) for axis in row.axes)
    return Weight(name, shape, row, layer, expert)


def _size(axis: Axis, packing: Packing, spec: ModelSpec, layer: LayerSpec | None) -> int:
    fixed = {
        Axis.VOCAB: spec.vocab_size,
        Axis.HIDDEN: spec.hidden_size,
        Axis.HEAD_CHANNEL: spec.head_dim,
        Axis.SINGLE: 1,
    }
    if axis in fixed:
        return fixed[axis]
    match axis:
        case Axis.FFN | Axis.EXPERT | Axis.EXPERT_FFN | Axis.SHARED_FFN if layer is not None:
            return _feed_forward_size(axis, layer) * (2 if packing is Packing.GATE_UP else 1)
        case Axis.HEAD if layer is not None:
            extra = 2 * layer.attention.num_query_groups if packing is Packing.QKV else 0
            return (layer.attention.num_attention_heads + extra) * spec.head_dim
        case Axis.KV_GROUP if layer is not None:
            return layer.attention.num_query_groups * spec.head_dim
        case _ if layer is not None and isinstance(layer.mixer, Mamba):
            return _mamba_size(axis, packing, layer.mixer)
    raise AssertionError(f"axis {axis} has no size here")


def _feed_forward_size(axis: Axis, layer: LayerSpec) -> int:
    if axis is Axis.FFN:
        return layer.mlp.ffn_hidden_size
    experts = layer.moe
    sizes = {
        Axis.EXPERT: experts.num_experts,
        Axis.EXPERT_FFN: experts.expert_ffn_hidden_size,
        Axis.SHARED_FFN: experts.shared_ffn_hidden_size,
    }
    return sizes[axis]


def _mamba_size(axis: Axis, packing: Packing, mamba: Mamba) -> int:
    channels = mamba.inner_size if packing is Packing.PLAIN else sum(_mamba_rows(packing, mamba).values())
    sizes = {
        Axis.MAMBA_CHANNEL: channels,
        Axis.MAMBA_HEAD: mamba.mamba_num_heads,
        Axis.MAMBA_TAP: mamba.conv_kernel,
    }
    return sizes[axis]
