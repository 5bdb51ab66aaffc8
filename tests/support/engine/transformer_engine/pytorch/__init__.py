"""The modules that Megatron's wrappers derive from."""

from transformer_engine.pytorch import distributed, fp8, ops, optimizers
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.linear import GroupedLinear, LayerNormLinear, Linear
from transformer_engine.pytorch.norms import LayerNorm, RMSNorm


class Fp8Padding:
    """Named by Megatron's experts; fp8 only."""


class Fp8Unpadding:
    """Named by Megatron's experts; fp8 only."""


__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "ops",
    "optimizers",
]
