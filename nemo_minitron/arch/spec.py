"""The architecture of a decoder-only language model as plain, frozen data."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from nemo_minitron.arch.axes import LAYER_AXES, PrunableAxis, Scope, size_divisor
from nemo_minitron.arch.layer import KINDS, LayerSpec, Mamba, Moe
from nemo_minitron.errors import SpecError


class Activation(StrEnum):
    """What stands between the two MLP matrices. Gated kinds double the rows of the first one."""

    SWIGLU = "swiglu"
    GEGLU = "geglu"
    """With the exact GELU."""
    GEGLU_TANH = "geglu_tanh"
    """With GELU's approximation by tanh, as Gemma has it."""
    GELU = "gelu"
    SQUARED_RELU = "squared_relu"

    @property
    def gated(self) -> bool:
        """Whether the first MLP matrix holds a gate and an up half."""
        return self in (Activation.SWIGLU, Activation.GEGLU, Activation.GEGLU_TANH)


class Norm(StrEnum):
    """Kind of normalisation; `1p` kinds store their scale less 1."""

    RMSNORM = "rmsnorm"
    RMSNORM1P = "rmsnorm1p"
    LAYERNORM = "layernorm"
    LAYERNORM1P = "layernorm1p"

    @property
    def zero_centred(self) -> bool:
        """Whether a stored weight of zero is a scale of one."""
        return self in (Norm.RMSNORM1P, Norm.LAYERNORM1P)

    @property
    def subtracts_mean(self) -> bool:
        """Whether it is a LayerNorm: it subtracts the mean over channels, and has a bias."""
        return self in (Norm.LAYERNORM, Norm.LAYERNORM1P)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama-3.1 rotary frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Positions divided by a factor (`rope_type: linear`)."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): short wavelengths stay, long ones are stretched, attention gets sharper.

    `attention_factor` multiplies cosines and sines; None: `0.1 ln(factor) + 1`.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def temperature(self) -> float:
        """Factor of rotated queries, and of rotated keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


AnyScaling = RopeScaling | LinearScaling | YarnScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """An embedding, a sequence of layers with their own sizes, and a head.

    `head_dim` never changes under pruning and is not `hidden_size / num_attention_heads` in a pruned model.
    """

    vocab_size: int
    hidden_size: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_position_embeddings: int
    activation: Activation = Activation.SWIGLU
    norm: Norm = Norm.RMSNORM
    norm_eps: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    """Share of a head's channels that turn with the position; 0: attention knows no positions."""
    rope_scaling: AnyScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    """A norm over the channels of each query head, and of each key head."""
    full_width_qk_norm: bool = False
    """With `qk_norm`: one norm over the channels of all query heads together, and one over those of all key heads, each
    with a weight for every channel (OLMoE)."""
    linear_bias: bool = False
    """Bias on the attention output and both MLP matrices."""
    post_norms: bool = False
    """A norm more behind attention and MLP each, before their outputs join the residual stream (Gemma 3)."""
    scaled_embeddings: bool = False
    """Embeddings enter the first layer times `sqrt(hidden_size)` (Gemma); the output layer takes them as they are."""
    query_scalar: float | None = None
    """Attention scores are divided by its root; None: by that of `head_dim`."""
    sliding_window: int | None = None
    """Positions that a query of a local layer sees, its own among them."""
    local_rotary_base: float | None = None
    """Rotary base of local layers, without scaling; None: they turn as the others do."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise SpecError(
                "architecture: " + "; ".join(problems),
                rule="every size is positive and fits the others",
            )

    @property
    def attention_scale(self) -> float | None:
        """Factor of the attention scores; None: `1 / sqrt(head_dim)`."""
        sharper = self.rope_scaling.temperature**2 if isinstance(self.rope_scaling, YarnScaling) else 1.0
        if self.query_scalar is None and sharper == 1:
            return None
        return sharper / math.sqrt(self.query_scalar or self.head_dim)

    @property
    def num_layers(self) -> int:
        """How many transformer layers there are."""
        return len(self.layers)

    def size(self, row: PrunableAxis, layer: int | None = None) -> int:
        """Units of an axis in the model or, for an axis of layers, in one of its layers; 0 where there are none."""
        if row.scope is Scope.MODEL:
            return int(getattr(self, row.size))
        if layer is None:
            raise AssertionError(f"{row.axis} is an axis of layers")
        return self.layers[layer].size(row)

    def common_size(self, row: PrunableAxis) -> int:
        """Units of an axis in the model, or in its first layer that has the axis; 0 where none has."""
        if row.scope is Scope.MODEL:
            return self.size(row)
        return next((size for layer in self.layers if (size := layer.size(row))), 0)

    def units(self, row: PrunableAxis, layer: int) -> int:
        """Units of an axis of layers in one of them; see `LayerSpec.units`."""
        return self.layers[layer].units(row)

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(layer.has_experts for layer in self.layers)

    @property
    def kinds(self) -> dict[str, int]:
        """Number of layers of each kind that it has, in the order of `arch.layer.KINDS`; "" for a kind of no name."""
        found = [layer.kind for layer in self.layers]
        return {kind: found.count(kind) for kind in (*KINDS, "") if kind in found}

    @property
    def norms_each_head(self) -> bool:
        """Whether each query and key head has a norm of its own."""
        return self.qk_norm and not self.full_width_qk_norm

    @property
    def needs_own_layers(self) -> bool:
        """Whether it has something that only our own layers have, and Transformer Engine's do not."""
        return self.post_norms or self.full_width_qk_norm or any(layer.local for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        return len({tuple(layer.sizes.items()) for layer in self.layers}) == 1

    @property
    def layer(self) -> LayerSpec:
        """The first layer, whose sizes all layers share.

        Raises:
            SpecError: The layers differ.
        """
        if not self.is_uniform:
            raise SpecError("the model's layers differ in size", rule="this step needs layers of one size")
        return self.layers[0]

    def with_sizes(
        self,
        *,
        num_layers: int | None = None,
        hidden_size: int | None = None,
        ffn_hidden_size: int | None = None,
        num_attention_heads: int | None = None,
        num_query_groups: int | None = None,
        **others: int | None,
    ) -> "ModelSpec":
        """A copy with other sizes; None keeps what is there.

        Layers are cut from the end: which ones really go is the plan's matter. In a model with experts, or with layers
        of several kinds, a layer takes the sizes that it has.
        """
        sizes = {
            "ffn_hidden_size": ffn_hidden_size,
            "num_attention_heads": num_attention_heads,
            "num_query_groups": num_query_groups,
            **others,
        }
        wanted = {key: value for key, value in sizes.items() if value is not None}
        mixed = self.has_experts or len(self.kinds) > 1
        layers = self.layers if num_layers is None else (self.layers * num_layers)[:num_layers]
        return replace(
            self,
            hidden_size=self.hidden_size if hidden_size is None else hidden_size,
            layers=tuple(layer.with_sizes(**_fitting(layer, wanted, mixed=mixed)) for layer in layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` is the inverse. Layers that are all the same are stored once.

        Traits that only some families have are left out of the others' data, so that their digests stay what they were.
        """
        data = asdict(self) | {"activation": self.activation.value, "norm": self.norm.value}
        data = {key: value for key, value in data.items() if key not in _TRAITS or value not in (None, False)}
        if self.rope_scaling is not None and (kind := _SCALINGS[type(self.rope_scaling)]):
            data["rope_scaling"]["kind"] = kind
        if len(set(self.layers)) == 1:
            data["layers"] = {"count": self.num_layers, **self.layers[0].to_dict()}
        else:
            data["layers"] = [layer.to_dict() for layer in self.layers]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelSpec":
        """Read back what `to_dict` wrote.

        Older data also named a family of models (`families.recorded_family`); what is computed does not depend on it.

        Raises:
            SpecError: A key is missing or unknown, or a value does not fit.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known - {"family"}):
            raise SpecError(
                f"architecture: unknown key(s) {', '.join(unknown)}",
                rule=f"known keys: {', '.join(sorted(known))}",
            )
        values = {key: value for key, value in data.items() if key != "family"}
        try:
            values["layers"] = _layers_from(values["layers"])
            values["activation"] = Activation(values.get("activation", Activation.SWIGLU))
            values["norm"] = Norm(values.get("norm", Norm.RMSNORM))
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = _scaling_from(values["rope_scaling"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"architecture: {error}", rule="the data of ModelSpec.to_dict") from error

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, 64 hex digits; the same on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _fitting(layer: LayerSpec, sizes: dict[str, int], *, mixed: bool) -> dict[str, int]:
    """Of some sizes those that a layer has, if layers may be of several kinds."""
    return {name: size for name, size in sizes.items() if not mixed or name in layer.sizes}


_TRAITS = (
    *("post_norms", "scaled_embeddings", "query_scalar", "sliding_window", "local_rotary_base"),
    "full_width_qk_norm",
)


# Llama 3.1's has no name in the data: it was the only one.
_SCALINGS: dict[type[Any], str | None] = {RopeScaling: None, LinearScaling: "linear", YarnScaling: "yarn"}


def _scaling_from(data: dict[str, Any]) -> AnyScaling:
    kind = data.get("kind")
    found = next((scaling for scaling, name in _SCALINGS.items() if name == kind), None)
    if found is None:
        raise ValueError(f"rope_scaling.kind = {kind!r}")
    scaling: AnyScaling = found(**{key: value for key, value in data.items() if key != "kind"})
    return scaling


MAX_LAYERS = 10_000
"""More are a damaged file, and a list of them could fill the memory."""


def _layers_from(data: Any) -> tuple[LayerSpec, ...]:
    if isinstance(data, dict):
        sizes = {key: value for key, value in data.items() if key != "count"}
        if type(data["count"]) is not int or not 0 <= data["count"] <= MAX_LAYERS:
            raise ValueError(f"layers.count = {str(data['count'])[:40]} is not a number up to {MAX_LAYERS}")
        return (LayerSpec.from_dict(sizes),) * data["count"]
    return tuple(LayerSpec.from_dict(item) for item in data)


def _problems(spec: ModelSpec) -> Iterator[str]:
    for name in ("vocab_size", "hidden_size", "head_dim", "max_position_embeddings"):
        if getattr(spec, name) < 1:
            yield f"{name} = {getattr(spec, name)} must be at least 1"
    if any(layer.local for layer in spec.layers) and (spec.sliding_window or 0) < 1:
        yield f"layers are local, but sliding_window = {spec.sliding_window}"
    if spec.full_width_qk_norm and (not spec.qk_norm or spec.norm.subtracts_mean):
        yield f"full_width_qk_norm = True with qk_norm = {spec.qk_norm} and norm = {spec.norm}: it is an RMSNorm"
    if not spec.layers:
        yield "zero layers; at least 1 must stay"
    for index, layer in enumerate(spec.layers):
        if not layer.parts:
            yield f"layer {index} has neither a mixer nor a feed-forward"
        elif min(layer.sizes.values()) < 1:
            yield f"layer {index}: heads, groups, FFN and states must each be at least 1"
        else:
            yield from (f"layer {index}: {problem}" for problem in _nesting_problems(layer))
        if isinstance(layer.mixer, Mamba) and spec.post_norms:
            yield f"layer {index}: a Mamba mixer has no norm behind it (post_norms)"
        if isinstance(layer.feed_forward, Moe):
            yield from (f"layer {index}: {problem}" for problem in layer.feed_forward.problems)
            if spec.linear_bias or spec.post_norms:
                yield f"layer {index}: experts have neither biases nor a norm behind them (linear_bias, post_norms)"


def _nesting_problems(layer: LayerSpec) -> Iterator[str]:
    for row in LAYER_AXES:
        size, outer = layer.size(row), size_divisor(row)
        if outer is not None and size and size % layer.size(outer):
            yield f"{row.size} = {size} is not a multiple of {outer.size} = {layer.size(outer)}"
