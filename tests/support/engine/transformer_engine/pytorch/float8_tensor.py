"""A tensor in fp8; there is none."""


class Float8Tensor:
    """Named by Megatron's checkpoints."""
