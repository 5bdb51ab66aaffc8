"""The keys of a recipe that are sizes: of the student, of a search's space, and of single layers."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nemo_minitron.config.base import Count, NonNegative, Positive, Section
from nemo_minitron.config.budget import BudgetConfig
from nemo_minitron.config.depth import BLOCK_INFLUENCE
from nemo_minitron.config.sites import Aggregation, ExpertMetric


def _size(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (whole or (isinstance(value, float) and 0 < value < 1)):
        raise ValueError("an integer of at least 1, or a share of the teacher's between 0 and 1, such as 0.75")
    return value


Size = Annotated[int | float, BeforeValidator(_size)]
"""An integer: so many units. A number between 0 and 1: that share of the teacher's, rounded to `target.multiple_of`."""


Parts = Count | tuple[NonNegative, ...]
"""So many layers, or these."""


class MultipleOf(Section):
    """What sizes are multiples of: shares are rounded to it (to the nearest, halves up), explicit sizes must be it."""

    num_layers: Count = 1
    hidden_size: Count = 1
    ffn_hidden_size: Count = 1
    num_attention_heads: Count = 1
    num_query_groups: Count = 1
    num_experts: Count = 1
    expert_ffn_hidden_size: Count = 1
    shared_ffn_hidden_size: Count = 1
    mamba_num_heads: Count = 1
    mamba_num_groups: Count = 1
    mamba_head_dim: Count = 1


class LayerSizes(Section):
    """Sizes of one layer; None for what the target says of all layers."""

    ffn_hidden_size: Size | None = None
    num_attention_heads: Size | None = None
    num_query_groups: Size | None = None
    num_experts: Size | None = None
    expert_ffn_hidden_size: Size | None = None
    shared_ffn_hidden_size: Size | None = None
    mamba_num_heads: Size | None = None
    mamba_num_groups: Size | None = None
    mamba_head_dim: Size | None = None


class TargetConfig(BudgetConfig):
    """Sizes of the student, each an integer or a share of the teacher's such as 0.75; None keeps the teacher's.

    With a budget (`params: 100M`, `ratio: 0.75`) instead, None leaves the size to stage `search`.
    """

    num_layers: Size | None = None
    """Layers to keep; those that are worth least by `depth_metric` go."""
    drop_layers: tuple[int, ...] | None = None
    """Exactly these layers go, counted from 0, instead of a choice by scores."""
    num_mamba_layers: Count | None = None
    """Of a model whose layers are of several kinds: so many Mamba layers stay, those that are worth most among them.
    Layers of kinds that are not named all stay. This and the next six in place of `num_layers`."""
    num_attention_layers: Count | None = None
    """Layers of attention alone."""
    num_mlp_layers: Count | None = None
    """Layers of an MLP alone."""
    num_moe_layers: Count | None = None
    """Layers of experts alone."""
    num_mamba_dense_layers: Count | None = None
    """Layers of Mamba and an MLP, beside others."""
    num_dense_layers: Count | None = None
    """Layers of attention and an MLP, beside others."""
    num_expert_layers: Count | None = None
    """Layers of attention and experts, beside others."""
    depth_metric: str = BLOCK_INFLUENCE
    """What layers are chosen by: `block_influence`, or one that `score.depth.metrics` measures."""
    depth_contiguous: bool = False
    """Drop the best block of consecutive layers instead of the layers that are worth least one by one."""
    drop_mixers: Parts | None = None
    """Attention, or whatever mixes positions, that goes out of layers whose feed-forward stays: a number, for those
    that are worth least by `sublayer_metric`, or a list of layers, counted from 0."""
    drop_feed_forwards: Parts | None = None
    """MLPs that go out of layers whose mixer stays, likewise; chosen after mixers."""
    sublayer_metric: Literal["block_influence", "lm_loss"] = "block_influence"
    """What mixers and feed-forwards are chosen by; `score.sublayers` measures it."""
    hidden_size: Size | None = None
    ffn_hidden_size: Size | None = None
    num_attention_heads: Size | None = None
    """Query heads of a layer; a multiple of its KV groups."""
    num_query_groups: Size | None = None
    by_layer: dict[NonNegative, LayerSizes] = Field(default_factory=dict)
    """Sizes of single layers by their number in the teacher, as `{3: {ffn_hidden_size: 768}}`; such a student can be
    exported as `.nemo` only."""
    num_experts: Size | None = None
    """Routed experts of a layer."""
    expert_ffn_hidden_size: Size | None = None
    """Neurons of each routed expert."""
    shared_ffn_hidden_size: Size | None = None
    """Neurons of the shared expert."""
    top_k: Count | None = None
    """Experts that a token is routed to; None keeps the teacher's number."""
    expert_metric: ExpertMetric = ExpertMetric.REAP
    """What experts are chosen by."""
    mamba_num_heads: Size | None = None
    """Mamba heads of a layer; a multiple of its groups."""
    mamba_num_groups: Size | None = None
    mamba_head_dim: Size | None = None
    """Channels of a Mamba head."""
    multiple_of: MultipleOf = MultipleOf()
    """A divisor for each axis, as `{hidden_size: 64, ffn_hidden_size: 128}`; an integer stands for these two axes."""
    rescale_norms: bool = True
    """When hidden channels go, scale RMSNorm's weight and epsilon so that channels that were zero could go without a
    trace. Left alone, the norm of fewer channels is another one."""
    merge_head_residuals: bool = False
    """Fold what a dropped query head differs by from a kept one into that one's weights: `2 kept - dropped`, the
    paper's residual merging (section 2.3). With grouped queries, in query weights and inside a group only."""
    merge_layers: bool = False
    """Refit the second MLP matrix of the layer before dropped ones, so that it adds to the residual stream what they
    added, as far as a linear map can (ReplaceMe, arXiv:2505.02819). Stage `score` then passes over
    `score.merge_samples` once more, and depends on `target`."""
    merge_ridge: Positive = 0.3
    """Ridge penalty of that fit, relative to each neuron's second moment: more holds the weights where they are."""
    random_seed: NonNegative | None = None
    """Choose what stays at random, whatever the scores are: the baseline."""
    batch_aggregation: Aggregation = Aggregation.L2
    sequence_aggregation: Aggregation = Aggregation.MEAN

    @field_validator("multiple_of", mode="before")
    @classmethod
    def _for_both_widths(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return {"hidden_size": value, "ffn_hidden_size": value} if whole else value

    def for_layer(self, number: int) -> "TargetConfig":
        """What is asked of one layer of the teacher: its own sizes in the place of those of all layers."""
        if (sizes := self.by_layer.get(number)) is None:
            return self
        return self.model_copy(update=sizes.model_dump(exclude_none=True))


def _limit(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (whole or (isinstance(value, float) and 0 < value <= 1)):
        raise ValueError("an integer of at least 1, or a fraction of the teacher's size up to 1.0, such as 0.5")
    return value


Limit = Annotated[int | float, BeforeValidator(_limit)]
"""An integer: a size. A number up to 1.0: that fraction of the teacher's size."""


class AxisConfig(Section):
    """The sizes of one axis that the search may choose: a list, or every step from `min` to `max`."""

    values: tuple[Count, ...] | None = None
    min: Limit | None = None
    """Smallest size; None for half the teacher's."""
    max: Limit | None = None
    """Largest size; None for the teacher's, which belongs to the space even if it is no multiple of `step`."""
    step: Count | None = None
    """Sizes are multiples of it, and of `target.multiple_of`; None for the axis's own step (docs/search.md)."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.values is not None and any(x is not None for x in (self.min, self.max, self.step)):
            raise ValueError("values, or min, max and step; not both")
        if self.values is not None and not self.values:
            raise ValueError("values is empty")
        return self


def _axis(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"values": [value]}
    return {"values": value} if isinstance(value, list | tuple) else value


AxisSpace = Annotated[AxisConfig, BeforeValidator(_axis)]
"""Also a list of sizes, or one size."""


class SpaceConfig(Section):
    """What the search may choose from. A size that `target` names is fixed; an axis that neither names has defaults."""

    num_layers: AxisSpace | None = None
    """Of a model whose layers are all of one kind; of another one, those of each kind, in the next seven."""
    num_mamba_layers: AxisSpace | None = None
    num_attention_layers: AxisSpace | None = None
    num_mlp_layers: AxisSpace | None = None
    num_moe_layers: AxisSpace | None = None
    num_mamba_dense_layers: AxisSpace | None = None
    num_dense_layers: AxisSpace | None = None
    num_expert_layers: AxisSpace | None = None
    hidden_size: AxisSpace | None = None
    ffn_hidden_size: AxisSpace | None = None
    num_attention_heads: AxisSpace | None = None
    """None keeps the teacher's heads, as the papers recommend (arXiv:2408.11796)."""
    num_query_groups: AxisSpace | None = None
    """None keeps the teacher's KV groups."""
    num_experts: AxisSpace | None = None
    expert_ffn_hidden_size: AxisSpace | None = None
    shared_ffn_hidden_size: AxisSpace | None = None
    """None keeps the teacher's."""
    mamba_num_heads: AxisSpace | None = None
    """Mamba heads of a layer; a multiple of its groups."""
    mamba_head_dim: AxisSpace | None = None
    """None keeps the teacher's."""
    mamba_num_groups: AxisSpace | None = None
    """None keeps the teacher's."""


class LayerwiseConfig(Section):
    """Sizes that differ from layer to layer, chosen by the loss of replacing each layer alone.

    Source: Puzzle, arXiv:2411.19146.
    """

    ffn_hidden_size: tuple[Limit, ...] = (1.0, 0.75, 0.5, 0.25)
    """FFN sizes that a layer may have."""
    num_query_groups: tuple[Limit, ...] = (1.0,)
    """KV groups that a layer may have; each keeps its query heads."""
    drop: bool = True
    """Whether a layer may go altogether."""
    drop_parts: bool = False
    """Whether a layer may lose its attention or its MLP alone."""
    samples: Count = 2
    """Calibration samples that each replacement is measured on."""
