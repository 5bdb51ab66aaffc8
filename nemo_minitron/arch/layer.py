"""A layer of a model: a mixer and a feed-forward, each of one of several kinds, as plain, frozen data."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from nemo_minitron.arch.axes import PrunableAxis, outer_axis
from nemo_minitron.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """A mixer: causal attention with grouped queries."""

    num_attention_heads: int
    num_query_groups: int
    local: bool = False
    """Whether its queries see only the last `ModelSpec.sliding_window` positions."""

    @property
    def shares_keys(self) -> bool:
        """Whether several query heads have the same keys and values."""
        return self.num_query_groups < self.num_attention_heads

    def head_size(self, width: int) -> float:
        """Channels of a head if all query heads together had `width`."""
        return width / self.num_attention_heads

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the names of their fields."""
        return {"num_attention_heads": self.num_attention_heads, "num_query_groups": self.num_query_groups}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """A feed-forward: two matrices with an activation between them."""

    ffn_hidden_size: int

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the names of their fields."""
        return {"ffn_hidden_size": self.ffn_hidden_size}


class RouterScore(StrEnum):
    """What a router makes of its logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Moe:
    """A feed-forward: experts, each an MLP, of which a router chooses `top_k` for every token, and their weights."""

    num_experts: int
    expert_ffn_hidden_size: int
    """Of each routed expert."""
    top_k: int
    shared_ffn_hidden_size: int = 0
    """Of the expert that sees every token beside the chosen ones; 0: there is none."""
    shared_gate: bool = False
    """Whether the output of the shared expert is multiplied by the sigmoid of a linear function of the token."""
    score_function: RouterScore = RouterScore.SOFTMAX
    normalize_top_k: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""
    correction_bias: bool = False
    """Whether experts are chosen by their score plus a bias, which their weights do not have (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2). Training leaves it as it is."""
    scaling_factor: float = 1.0
    """Of the weights."""
    router_fp32: bool = False
    """Whether the router multiplies in fp32, whatever the dtype of the model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "score_function", RouterScore(self.score_function))

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the names of their fields."""
        sizes = {"num_experts": self.num_experts, "expert_ffn_hidden_size": self.expert_ffn_hidden_size}
        return sizes | ({"shared_ffn_hidden_size": self.shared_ffn_hidden_size} if self.shared_ffn_hidden_size else {})

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not fit together."""
        found = []
        if not 1 <= self.top_k <= self.num_experts:
            found.append(f"top_k = {self.top_k} with num_experts = {self.num_experts}: a token's experts must be there")
        if self.shared_gate and not self.shared_ffn_hidden_size:
            found.append("shared_gate = True without a shared expert")
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba:
    """A mixer: Mamba-2's selective state space (arXiv:2405.21060), with a causal convolution before and a gated norm.

    Fields are called as in Megatron's configuration.
    """

    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int
    """Channels of the state that each channel of a head keeps."""
    mamba_num_groups: int
    """Heads of a group share input and output maps of the state, and a norm."""
    conv_kernel: int = 4
    """Positions that the convolution sees, its own among them."""
    conv_bias: bool = True
    dt_min: float = 0.0
    """Step sizes are not below."""
    chunk_size: int = field(default=128, compare=False)
    """Positions that a scan takes together. Nothing is computed from it but speed."""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the names of their fields."""
        names = ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups")
        return {name: getattr(self, name) for name in names}

    @property
    def inner_size(self) -> int:
        """Channels of all heads."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def map_size(self) -> int:
        """Channels of the input maps of all groups, and of the output maps."""
        return self.mamba_num_groups * self.mamba_state_dim

    def parts(self) -> dict[str, int]:
        """Rows of each part of the input projection, by the letters of the paper, in order."""
        inner, maps = self.inner_size, self.map_size
        return {"z": inner, "x": inner, "B": maps, "C": maps, "dt": self.mamba_num_heads}


Mixer = Attention | Mamba
"""What exchanges information between positions."""
FeedForward = Mlp | Moe
"""What transforms each position."""
Part = Mixer | FeedForward

MIXERS: tuple[type[Mixer], ...] = (Attention, Mamba)
FEED_FORWARDS: tuple[type[FeedForward], ...] = (Mlp, Moe)
PARTS = ("mixer", "feed_forward")
_WORDS: dict[type[Any], str] = {Attention: "attention", Mamba: "Mamba", Mlp: "an MLP", Moe: "experts"}
_Part = TypeVar("_Part", bound=Part)

KINDS: dict[str, tuple[type[Part], ...]] = {
    "mamba": (Mamba,),
    "attention": (Attention,),
    "mlp": (Mlp,),
    "moe": (Moe,),
    "mamba_dense": (Mamba, Mlp),
    "dense": (Attention, Mlp),
    "expert": (Attention, Moe),
}
"""Kinds of layers that models mix, by the parts that they have."""


def count_label(kind: str) -> str:
    """What tables call the number of layers of a kind."""
    word = {"mamba": "Mamba", "mlp": "MLP", "moe": "MoE", "mamba_dense": "Mamba-MLP"}.get(kind, kind)
    return f"{word} layers"


def count_key(kind: str) -> str:
    """What the number of layers of a kind is called, in a recipe's `target` and `search.space`."""
    return f"num_{kind}_layers"


COUNT_KEYS: dict[str, str] = {count_key(kind): kind for kind in KINDS}
"""Kinds by those names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One layer: a mixer, then a feed-forward; each reads and writes the residual stream, and either may be absent."""

    mixer: Mixer | None
    feed_forward: FeedForward | None

    @property
    def parts(self) -> tuple[Mixer | FeedForward, ...]:
        """The mixer and the feed-forward, as far as there are any."""
        return tuple(part for part in (self.mixer, self.feed_forward) if part is not None)

    @property
    def is_transformer(self) -> bool:
        """Whether it is attention and an MLP."""
        return isinstance(self.mixer, Attention) and isinstance(self.feed_forward, Mlp)

    @property
    def described(self) -> str:
        """Its parts in words, as `attention and an MLP`, or `an MLP alone`."""
        words = [_WORDS[type(part)] for part in self.parts]
        return " and ".join(words) if len(words) > 1 else f"{words[0]} alone" if words else "nothing"

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is, by its parts alone; "" for none of them."""
        return next((name for name, parts in KINDS.items() if parts == tuple(map(type, self.parts))), "")

    def find(self, kind: type[_Part]) -> _Part | None:
        """The part of a kind; None if it has none."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    def part(self, kind: type[_Part]) -> _Part:
        """The part of a kind.

        Raises:
            SpecError: It has none.
        """
        if (found := self.find(kind)) is None:
            missing = _WORDS[kind].removeprefix("an ")
            raise SpecError(f"a layer has no {missing}", rule="this step needs one in every layer")
        return found

    @property
    def attention(self) -> Attention:
        """Its `part` of that kind."""
        return self.part(Attention)

    @property
    def mamba(self) -> Mamba:
        """Its `part` of that kind."""
        return self.part(Mamba)

    @property
    def mlp(self) -> Mlp:
        """Its `part` of that kind."""
        return self.part(Mlp)

    @property
    def moe(self) -> Moe:
        """Its `part` of that kind."""
        return self.part(Moe)

    @property
    def has_experts(self) -> bool:
        """Whether its feed-forward is a mixture of experts."""
        return isinstance(self.feed_forward, Moe)

    @property
    def local(self) -> bool:
        """Whether its queries see only the last `ModelSpec.sliding_window` positions."""
        return isinstance(self.mixer, Attention) and self.mixer.local

    @property
    def sizes(self) -> dict[str, int]:
        """Every size of the layer by the name of its field."""
        return {name: size for part in self.parts for name, size in part.sizes.items()}

    def size(self, row: PrunableAxis) -> int:
        """Size of an axis; 0 for an axis that the layer does not have."""
        return self.sizes.get(row.size, 0)

    def units(self, row: PrunableAxis) -> int:
        """Units of an axis in the complete layer, which is its size unless that counts those of one expert alone."""
        outer = outer_axis(row) if row.each else None
        return self.size(row) * (1 if outer is None else self.size(outer))

    def with_sizes(self, **sizes: int) -> "LayerSpec":
        """A copy with other sizes, by the names of `sizes`.

        Raises:
            SpecError: The layer has no such size.
        """
        if unknown := sorted(set(sizes) - set(self.sizes)):
            raise SpecError(f"a layer has no {', '.join(unknown)}")
        return replace(self, **{name: _resized(getattr(self, name), sizes) for name in PARTS})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: the fields of both parts side by side, without those at their defaults; null for no part."""
        data: dict[str, Any] = {name: None for name in PARTS if getattr(self, name) is None}
        for part in self.parts:
            data |= {item.name: getattr(part, item.name) for item in fields(part) if _is_said(part, item)}
        return {name: value.value if isinstance(value, StrEnum) else value for name, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerSpec":
        """Read back what `to_dict` wrote.

        Raises:
            TypeError: The data has a field that no part has, or lacks one.
        """
        left = dict(data)
        layer = cls(
            mixer=_part_from(MIXERS, "mixer", left), feed_forward=_part_from(FEED_FORWARDS, "feed_forward", left)
        )
        if left:
            raise TypeError(f"a layer has no {', '.join(sorted(left))}")
        return layer

    def routed_to(self, top_k: int | None) -> "LayerSpec":
        """A copy whose tokens are routed to so many experts; None, or a layer without experts: as it is."""
        if top_k is None or not isinstance(self.feed_forward, Moe):
            return self
        return replace(self, feed_forward=replace(self.feed_forward, top_k=top_k))

    def without(self, *parts: str) -> "LayerSpec":
        """A copy that lacks parts, by their names in `PARTS`."""
        return replace(self, **dict.fromkeys(parts))

    def looking_back(self, *, local: bool) -> "LayerSpec":
        """A copy whose attention is local, or is not."""
        return replace(self, mixer=replace(self.attention, local=local))

    def on_rank(self, tensor: int) -> "RankSizes":
        """What one of `tensor` ranks holds; 0 for what the layer does not have."""
        heads, groups, neurons = (
            self.sizes.get(name, 0) // tensor for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
        )
        if isinstance(self.feed_forward, Moe):
            experts = self.feed_forward
            neurons = (experts.top_k * experts.expert_ffn_hidden_size + experts.shared_ffn_hidden_size) // tensor
        return RankSizes(heads, groups, neurons)


class RankSizes(NamedTuple):
    """What a tensor-parallel rank holds of a layer."""

    heads: int
    groups: int
    neurons: int
    """That a token passes through: of experts, those of the ones it is routed to and of the shared one."""


def transformer_layer(
    *, num_attention_heads: int, num_query_groups: int, ffn_hidden_size: int, local: bool = False
) -> LayerSpec:
    """A layer of attention and an MLP."""
    return LayerSpec(
        mixer=Attention(num_attention_heads=num_attention_heads, num_query_groups=num_query_groups, local=local),
        feed_forward=Mlp(ffn_hidden_size=ffn_hidden_size),
    )


def layers_of(
    layer: LayerSpec, count: int, feed_forward: Callable[[int], FeedForward] | None = None
) -> tuple[LayerSpec, ...]:
    """So many layers, all the same, or each with a feed-forward of its own by its number."""
    if feed_forward is None:
        return (layer,) * count
    return tuple(replace(layer, feed_forward=feed_forward(index)) for index in range(count))


def _resized(part: _Part | None, sizes: Mapping[str, int]) -> _Part | None:
    if part is None:
        return None
    changes: dict[str, Any] = {name: size for name, size in sizes.items() if name in part.sizes}
    return replace(part, **changes)


def _is_said(part: Part, item: Field[Any]) -> bool:
    return item.default is MISSING or getattr(part, item.name) != item.default


def _part_from(kinds: tuple[type[_Part], ...], name: str, left: dict[str, Any]) -> _Part | None:
    """A part of a layer, whose fields are taken out of the data; their names tell its kind."""
    if name in left:
        if (found := left.pop(name)) is not None:
            raise TypeError(f"a layer's {name} is {str(found)[:40]!r}, not null")
        return None
    kind = max(kinds, key=lambda each: sum(item.name in left for item in fields(each)))
    return kind(**{item.name: left.pop(item.name) for item in fields(kind) if item.name in left})
