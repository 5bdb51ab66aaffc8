"""Names of fp8 recipes. The stand-in computes in the numbers it is given, so nothing here does anything."""


class DelayedScaling:
    """The base class of Megatron's recipe."""


class Format:
    """Number formats."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"
