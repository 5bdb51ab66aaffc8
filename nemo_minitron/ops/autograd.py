"""The typed door to `torch.autograd.Function`, whose `apply` has no types."""

from typing import Any

from torch.autograd import Function


def apply(function: type[Function], *args: object) -> Any:
    """What a function's `forward` returns, recorded for its `backward`."""
    return function.apply(*args)  # type: ignore[no-untyped-call]
