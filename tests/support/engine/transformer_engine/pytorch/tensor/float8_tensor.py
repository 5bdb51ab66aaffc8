"""The later place of `Float8Tensor`."""

from transformer_engine.pytorch.float8_tensor import Float8Tensor

__all__ = ["Float8Tensor"]
