"""Megatron's optimizer behind the interface Lightning expects of one."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from nemo_minitron.megatron.optim import StepInfo, TrainOptimizer


class MegatronOptimizer(Optimizer):
    """Passes Lightning's calls on to a `TrainOptimizer`, which owns master weights, clipping and schedule.

    `last` is what the latest step reported.
    """

    def __init__(self, inner: TrainOptimizer) -> None:
        # Optimizer.__init__ would demand parameters that Megatron keeps to itself (fp32 shards).
        self.inner = inner
        self.last: StepInfo | None = None
        self.defaults: dict[str, Any] = {}
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Megatron's groups; loggers read `lr` from them."""
        return self.inner.optimizer.param_groups

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """Empty: states are sharded and saved by the strategy."""
        return {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and Megatron's gradient buffers."""
        self.inner.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None, *, refuse: Callable[[float], bool] | None = None) -> Any:
        """Update the weights; a closure, if given, runs first.

        Args:
            closure: Lightning's.
            refuse: Asked with the gradient norm whether to skip the step; the same answer on every rank.
        """
        result = closure() if closure is not None else None
        self.last = self.inner.step(refuse)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Empty: see `state`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: see `state`."""
