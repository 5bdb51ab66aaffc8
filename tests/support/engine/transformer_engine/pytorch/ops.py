"""Operations that Megatron's fused MLP is put together from; named only."""

from torch import nn


class Sequential(nn.Module):
    """A chain of operations."""


class FusibleOperation(nn.Module):
    """One of them."""


GEGLU = GELU = ReGLU = ReLU = SwiGLU = FusibleOperation
