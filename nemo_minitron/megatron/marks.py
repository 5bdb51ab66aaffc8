"""What Megatron reads off parameters: how they are split over ranks, and how their gradients arrive."""

from torch import nn


def mark(parameter: nn.Parameter, **marks: object) -> None:
    """Set attributes of a parameter that Megatron looks for, and torch does not know."""
    for name, value in marks.items():
        setattr(parameter, name, value)
