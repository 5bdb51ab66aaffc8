"""Tensors in other numbers; there are none."""


class QuantizedTensor:
    """Named by Megatron."""
