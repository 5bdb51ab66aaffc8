"""fp8 is always off."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class FP8GlobalStateManager:
    """Asked by Megatron's checkpointing and its wrappers."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(*args: Any, enabled: bool = False, **kwargs: Any) -> AbstractContextManager[None]:
    """A block without fp8.

    Raises:
        RuntimeError: It was asked for.
    """
    if enabled:
        raise RuntimeError("fp8")
    return nullcontext()
