"""A tensor in fp8 with scales by block; there is none."""


class MXFP8Tensor:
    """Named by Megatron."""
