"""The words of the weight table: which axis a dimension belongs to, and how its rows are packed."""

from enum import StrEnum


class Axis(StrEnum):
    """An axis of an architecture along which units can be counted, ranked and removed."""

    VOCAB = "vocab"
    """Token rows of embedding and output layer."""
    HIDDEN = "hidden"
    """Channels of the residual stream; one index set for the whole model."""
    FFN = "ffn"
    """Neurons of a layer's MLP; every layer has its own index set."""
    HEAD = "head"
    """Query heads of a layer, `head_dim` channels each; ranked inside their KV group."""
    KV_GROUP = "kv_group"
    """Key/value heads of a layer, each with its query heads."""
    LAYER = "layer"
    """Whole transformer layers."""
    HEAD_CHANNEL = "head_channel"
    """Channels inside one head; never pruned, present so that per-head norms have an axis."""


class Packing(StrEnum):
    """How the named parts of a fused weight lie along its first dimension (canonical, unsharded form)."""

    PLAIN = "plain"
    """One part."""
    QKV = "qkv"
    """Grouped by KV head: for each group its query heads, then its key head, then its value head."""
    GATE_UP = "gate_up"
    """All gate rows, then all up rows."""
