"""FusedAdam and the multi-tensor functions that Megatron prefers to its own."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose moments are made at a parameter's first step, and whose step count is the group's."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise RuntimeError("Adam with L2 regularisation")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def initialize_state(self, param: Tensor) -> None:
        """Moments of one parameter."""
        self.state[param] = {"exp_avg": torch.zeros_like(param.data), "exp_avg_sq": torch.zeros_like(param.data)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.initialize_state(parameter)
        state, (beta1, beta2), step = self.state[parameter], group["betas"], group["step"]
        gradient = parameter.grad
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))


class FusedSGD(torch.optim.SGD):
    """Named by Megatron."""


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: Tensor, lists: Sequence[Sequence[Tensor]], *args: Any
) -> Any:
    """Call a function below on lists of tensors."""
    return op(2048 * 32, noop_flag, lists, *args)


def multi_tensor_l2norm(chunk: int, noop_flag: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool) -> Any:
    """The norm of all tensors of the first list together, `[1]`, and None."""
    norms = torch.stack([torch.linalg.vector_norm(x.float()) for x in lists[0]])
    return torch.linalg.vector_norm(norms).view(1), None


def multi_tensor_scale(chunk: int, noop_flag: Tensor, lists: Sequence[Sequence[Tensor]], scale: float) -> None:
    """Write the first list times a number into the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
