"""The axes of an architecture, the table of those that can be cut, and the sites where their units are measured.

Scores, sizes, rounds, plans, their validation and comparison, dry runs and reports iterate over `PRUNABLE` and name no
axis. A new axis is a row here, its sites, and the rows of its weights in `arch.weights`.
"""

from dataclasses import dataclass
from enum import StrEnum


class Axis(StrEnum):
    """An axis of an architecture along which units can be counted, ranked and removed."""

    VOCAB = "vocab"
    """Token rows of embedding and output layer."""
    HIDDEN = "hidden"
    """Channels of the residual stream; one index set for the complete model."""
    FFN = "ffn"
    """Neurons of a layer's MLP; every layer has its own index set."""
    HEAD = "head"
    """Query heads of a layer, `head_dim` channels each; ranked inside their KV group."""
    KV_GROUP = "kv_group"
    """Key/value heads of a layer, each with its query heads."""
    LAYER = "layer"
    """Complete transformer layers."""
    EXPERT = "expert"
    """Routed experts of a layer, each with its row of the router."""
    EXPERT_FFN = "expert_ffn"
    """Neurons of a layer's routed experts; every expert has its own, and all experts of a layer have equally many."""
    SHARED_FFN = "shared_ffn"
    """Neurons of the expert of a layer that sees every token."""
    HEAD_CHANNEL = "head_channel"
    """Channels inside one head; never pruned, present so that per-head norms have an axis."""
    MAMBA_GROUP = "mamba_group"
    """Groups of a layer's Mamba heads, each with an input and an output map of its state."""
    MAMBA_HEAD = "mamba_head"
    """Mamba heads of a layer; ranked inside their group."""
    MAMBA_CHANNEL = "mamba_channel"
    """Channels inside one Mamba head; all heads of a layer keep the same ones."""
    MAMBA_TAP = "mamba_tap"
    """Taps of a layer's causal convolution; never pruned."""
    SINGLE = "single"
    """A dimension of one; never pruned, present since other libraries store it."""


class Packing(StrEnum):
    """How the named parts of a fused weight lie along its first dimension (canonical, unsharded form)."""

    PLAIN = "plain"
    """One part."""
    QKV = "qkv"
    """Grouped by KV head: for each group its query heads, then its key head, then its value head."""
    GATE_UP = "gate_up"
    """All gate rows, then all up rows."""
    MAMBA_IN = "mamba_in"
    """Of all heads: the gate's channels (z), the input's (x); of all groups: input and output maps of the state (B, C);
    a step size for each head (dt)."""
    MAMBA_CONV = "mamba_conv"
    """What of `MAMBA_IN` the convolution passes over: x, B, C."""


class Scope(StrEnum):
    """How many index sets an axis has."""

    MODEL = "model"
    """One."""
    LAYER = "layer"
    """One for each layer that has the axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A place in a layer whose activations rank the units of an axis.

    Attributes:
        name: In score files.
        axis: The axis whose units its channels belong to.
        part: The part of a layer that it belongs to, `mixer` or `feed_forward`.
        kind: The class in `arch.layer` that this part is of; "" for any.
        is_split: Whether tensor-parallel ranks hold different channels of it; otherwise all of them hold all.
        where: What is measured there.
    """

    name: str
    axis: Axis
    part: str
    kind: str = ""
    is_split: bool
    where: str


SITES: tuple[Site, ...] = (
    Site(
        name="hidden.attention",
        axis=Axis.HIDDEN,
        part="mixer",
        kind="Attention",
        is_split=False,
        where="output of the norm before attention",
    ),
    Site(
        name="hidden.mlp",
        axis=Axis.HIDDEN,
        part="feed_forward",
        is_split=False,
        where="output of the norm before the MLP",
    ),
    Site(name="ffn", axis=Axis.FFN, part="feed_forward", is_split=True, where="input of mlp.linear_fc2"),
    Site(
        name="head",
        axis=Axis.HEAD,
        part="mixer",
        kind="Attention",
        is_split=True,
        where="input of self_attention.linear_proj",
    ),
    Site(
        name="hidden.mamba",
        axis=Axis.HIDDEN,
        part="mixer",
        kind="Mamba",
        is_split=False,
        where="output of the norm before Mamba",
    ),
    Site(
        name="mamba",
        axis=Axis.MAMBA_HEAD,
        part="mixer",
        kind="Mamba",
        is_split=True,
        where="the x part of mixer.in_proj's output",
    ),
    Site(
        name="expert_ffn",
        axis=Axis.EXPERT_FFN,
        part="feed_forward",
        is_split=True,
        where="input of each expert's linear_fc2 before the router's weight, over the tokens routed to it",
    ),
    Site(
        name="shared_ffn",
        axis=Axis.SHARED_FFN,
        part="feed_forward",
        is_split=True,
        where="input of mlp.shared_experts.linear_fc2",
    ),
)
"""Of a layer, in the order of a score file."""

TOKEN_SUMS = {
    "expert.output": "the router's weight of an expert times the L2 norm of its output, summed over tokens",
    "expert.routed": "tokens that were routed to an expert",
}
"""Sums over tokens by unit, by their names in score files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrunableAxis:
    """An axis that can be cut.

    Attributes:
        axis: Its name in the weight table.
        scope: Whether the model has one index set for it, or each layer one.
        size: Where its size stands: a field of the spec, or of a layer's mixer or feed-forward. It is also its key
            under a recipe's `target` and `target.multiple_of`.
        plan: Key of the kept indices in a plan.
        label: What tables call its size.
        unit: What messages call one of its units; the plural adds an s.
        divided_by: Key of a recipe's `parallel` that divides it over ranks; "" for none.
        within: The axis each of whose units holds equally many of this one's, so that only units of a kept one stay.
        each: Whether its size counts the units inside one unit of `within`, not those of the complete layer.
        sums: The axis whose scores inside a unit add up to the unit's score. Such an axis has no sites.
        token_sums: Keys of `TOKEN_SUMS` that its scores follow from. Such an axis has no sites.
        crosses: The axis with each of whose units each of this one's has a channel, as every Mamba head has every head
            channel. Their site shows all pairs, and a unit's score is the L2 norm over those with kept units of the
            other axis, as far as that one is decided before.
        is_head: Whether a unit is `head_dim` channels, whose L2 norm is the unit's score.
        mixes: Key, in a plan, of units that take on what dropped ones differ by (`pruning.mixes`); "" where that
            cannot be.
        symbol: A letter for it in names of candidates.
        coarse: A search steps through it by the power of two that makes at most `coarse` steps of the largest size; 0:
            by ones.
        is_searched: Whether a search chooses its size if the recipe says nothing.
        timed: Its name in latency tables; of an axis within another, that of its size divided by the other's.
    """

    axis: Axis
    scope: Scope
    size: str
    plan: str
    label: str
    unit: str
    divided_by: str = ""
    within: Axis | None = None
    each: bool = False
    sums: Axis | None = None
    token_sums: tuple[str, ...] = ()
    crosses: Axis | None = None
    is_head: bool = False
    mixes: str = ""
    symbol: str
    coarse: int = 0
    is_searched: bool = False
    timed: str = ""

    @property
    def units(self) -> str:
        """The plural of `unit`."""
        return f"{self.unit}s"

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where its units are measured; what they show there is added up."""
        own = tuple(site for site in SITES if site.axis is self.axis)
        return own or tuple(site for site in SITES if site.axis is self.crosses)


PRUNABLE: tuple[PrunableAxis, ...] = (
    PrunableAxis(
        axis=Axis.LAYER,
        symbol="L",
        is_searched=True,
        scope=Scope.MODEL,
        size="num_layers",
        plan="layers",
        label="layers",
        unit="layer",
        divided_by="pipeline",
    ),
    PrunableAxis(
        axis=Axis.HIDDEN,
        symbol="H",
        coarse=32,
        is_searched=True,
        scope=Scope.MODEL,
        size="hidden_size",
        plan="hidden",
        label="hidden size",
        unit="channel",
        timed="hidden",
    ),
    PrunableAxis(
        axis=Axis.KV_GROUP,
        symbol="G",
        scope=Scope.LAYER,
        size="num_query_groups",
        plan="kv_groups",
        label="KV groups",
        unit="KV group",
        divided_by="tensor",
        sums=Axis.HEAD,
        mixes="merged_groups",
        timed="groups",
    ),
    PrunableAxis(
        axis=Axis.HEAD,
        symbol="A",
        scope=Scope.LAYER,
        size="num_attention_heads",
        plan="heads",
        label="query heads",
        unit="head",
        divided_by="tensor",
        within=Axis.KV_GROUP,
        is_head=True,
        mixes="merged_heads",
        timed="ratio",
    ),
    PrunableAxis(
        axis=Axis.FFN,
        symbol="F",
        coarse=64,
        is_searched=True,
        scope=Scope.LAYER,
        size="ffn_hidden_size",
        plan="ffn",
        label="FFN size",
        unit="neuron",
        divided_by="tensor",
        timed="ffn",
    ),
    PrunableAxis(
        axis=Axis.EXPERT,
        symbol="E",
        coarse=16,
        is_searched=True,
        scope=Scope.LAYER,
        size="num_experts",
        plan="experts",
        label="experts",
        unit="expert",
        divided_by="expert",
        token_sums=tuple(TOKEN_SUMS),
    ),
    PrunableAxis(
        axis=Axis.EXPERT_FFN,
        symbol="X",
        coarse=64,
        is_searched=True,
        scope=Scope.LAYER,
        size="expert_ffn_hidden_size",
        plan="expert_ffn",
        label="expert FFN size",
        unit="neuron",
        divided_by="tensor",
        within=Axis.EXPERT,
        each=True,
    ),
    PrunableAxis(
        axis=Axis.SHARED_FFN,
        symbol="S",
        coarse=64,
        scope=Scope.LAYER,
        size="shared_ffn_hidden_size",
        plan="shared_ffn",
        label="shared expert FFN size",
        unit="neuron",
        divided_by="tensor",
    ),
    PrunableAxis(
        axis=Axis.MAMBA_CHANNEL,
        symbol="C",
        scope=Scope.LAYER,
        size="mamba_head_dim",
        plan="mamba_channels",
        label="Mamba head size",
        unit="Mamba head channel",
        crosses=Axis.MAMBA_HEAD,
        timed="mamba_channels",
    ),
    PrunableAxis(
        axis=Axis.MAMBA_GROUP,
        symbol="B",
        scope=Scope.LAYER,
        size="mamba_num_groups",
        plan="mamba_groups",
        label="Mamba groups",
        unit="Mamba group",
        divided_by="tensor",
        sums=Axis.MAMBA_HEAD,
        timed="mamba_groups",
    ),
    PrunableAxis(
        axis=Axis.MAMBA_HEAD,
        symbol="M",
        coarse=8,
        is_searched=True,
        scope=Scope.LAYER,
        size="mamba_num_heads",
        plan="mamba_heads",
        label="Mamba heads",
        unit="Mamba head",
        divided_by="tensor",
        within=Axis.MAMBA_GROUP,
        crosses=Axis.MAMBA_CHANNEL,
        timed="mamba_ratio",
    ),
)
"""Every axis that can be cut, in the order in which sizes are decided: an axis comes after the one it lies within."""

MODEL_AXES: tuple[PrunableAxis, ...] = tuple(row for row in PRUNABLE if row.scope is Scope.MODEL)
"""Axes of which the model has one index set."""
LAYER_AXES: tuple[PrunableAxis, ...] = tuple(row for row in PRUNABLE if row.scope is Scope.LAYER)
"""Axes of which every layer has its own index set."""

SEARCH_ORDER = (
    *(Axis.LAYER, Axis.HIDDEN, Axis.FFN, Axis.EXPERT_FFN, Axis.HEAD, Axis.KV_GROUP, Axis.EXPERT),
    Axis.SHARED_FFN,
    *(Axis.MAMBA_HEAD, Axis.MAMBA_CHANNEL, Axis.MAMBA_GROUP),
)
"""The axes of a search, in the order in which candidates are named; a model has some of them."""

_BY_AXIS = {row.axis: row for row in PRUNABLE}


def row_of(axis: Axis) -> PrunableAxis:
    """The row of an axis that can be cut.

    Raises:
        KeyError: It cannot.
    """
    return _BY_AXIS[axis]


def is_prunable(axis: Axis) -> bool:
    """Whether an axis can be cut."""
    return axis in _BY_AXIS


def outer_axis(row: PrunableAxis) -> PrunableAxis | None:
    """The row of the axis that an axis lies within."""
    return None if row.within is None else _BY_AXIS[row.within]


def size_divisor(row: PrunableAxis) -> PrunableAxis | None:
    """The row of the axis whose size divides an axis's size, since that one counts over all units it lies within."""
    return None if row.each else outer_axis(row)
