"""Random states and recomputation, as far as Megatron imports them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class CudaRNGStatesTracker:
    """The base class of Megatron's tracker for CUDA graphs, which nothing here uses."""

    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}

    def reset(self) -> None:
        self.states_ = {}


def checkpoint(*args: Any, **kwargs: Any) -> Any:
    """Recomputation under fp8.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError("fp8 recomputation")


def activation_recompute_forward(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
    """Tells fp8 that a forward pass is repeated; nothing here."""
    return nullcontext()


def is_fp8_activation_recompute_enabled() -> bool:
    """Never."""
    return False
