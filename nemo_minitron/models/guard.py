"""Watches training steps: which to skip, and when to give up."""

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from nemo_minitron.config.training import GuardConfig
from nemo_minitron.errors import TrainingError

WINDOW = 32
"""Gradient norms that a spike is measured against."""
WARM = 8
"""Fewer norms than that say nothing yet."""


class StepGuard:
    """Refuses a step whose loss or gradient norm is not finite, or whose gradient norm is a spike; counts them.

    Attributes:
        skipped: Steps refused so far, those before a resume included.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = 0
        self._in_a_row = 0
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._reason = ""

    def refuses(self, loss: float, grad_norm: float, *, agree: Callable[[bool], bool] = bool) -> bool:
        """Whether to skip the step. Every rank calls it with equal values.

        Args:
            loss: Of the global batch, in nats per token.
            grad_norm: Global L2 norm before clipping.
            agree: Whether all ranks say yes; asked where rounding might divide them.
        """
        reason = self._judge(loss, grad_norm, agree)
        if reason:
            self.skipped += 1
            self._in_a_row += 1
            self._reason = reason
        else:
            self._in_a_row = 0
            self._norms.append(grad_norm)
        return bool(reason)

    def check(self) -> None:
        """Give up after too many skipped steps in a row.

        Raises:
            TrainingError: With the reason of the last one.
        """
        if self._in_a_row >= self.config.max_consecutive_skips:
            raise TrainingError(
                f"{self._in_a_row} training steps in a row were skipped; the last one because its {self._reason}",
                rule=f"guard.max_consecutive_skips = {self.config.max_consecutive_skips}",
                remedy="lower the learning rate, lengthen the warm-up, or look at the data; saved checkpoints stay",
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to judge alike."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._norms = deque(state["norms"], maxlen=WINDOW)

    def _judge(self, loss: float, grad_norm: float, agree: Callable[[bool], bool]) -> str:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        factor = self.config.spike_factor
        if factor is None or len(self._norms) < WARM:
            return ""
        usual = median(self._norms)
        if agree(grad_norm <= factor * usual):
            return ""
        return f"gradient norm of {grad_norm:.3g} is more than {factor:g} times the usual {usual:.3g}"
