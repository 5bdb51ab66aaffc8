"""Gradients that are added up over data-parallel ranks while the backward pass goes on.

Megatron sends a bucket of gradients off as soon as the last of its parameters says that its gradient is complete. It
hears so from autograd. The fused losses give autograd no gradient of the output weight: they add it to `main_grad` in
their forward pass. So the weight reaches them as a leaf of their own, and says that it is complete when the loss's
backward pass begins: by then all that a micro-batch adds to it is there. A tied weight is complete twice, here and
where the embedding ends the backward pass; Megatron counts how often that is in the first step, and waits for as many.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_minitron.errors import LayoutError
from nemo_minitron.megatron import param_gather
from nemo_minitron.megatron.marks import mark
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.ops import autograd

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

_READY = "minitron_grad_ready"


def is_wanted(runtime: Runtime | None) -> bool:
    """Whether gradients are added up during the backward pass, decided here where the settings leave it open."""
    if runtime is None:
        return False
    wanted = runtime.parallel.overlap_grad_reduce
    if wanted is None:
        return bool(runtime.parallel.overlap_param_gather) or _has_gpu_replicas(runtime)
    return wanted


def gather_is_wanted(runtime: Runtime | None, *, distributed: bool) -> bool:
    """Whether weights are gathered during the next forward pass, decided here where the settings leave it open.

    Args:
        runtime: The running layout; None: they are not.
        distributed: Whether optimizer states are split over data-parallel ranks.

    Raises:
        LayoutError: They are to, and every rank updates all weights itself.
    """
    if runtime is None:
        return False
    wanted = runtime.parallel.overlap_param_gather
    if wanted and not distributed:
        raise LayoutError(
            "parallel.overlap_param_gather = true without the distributed optimizer",
            rule="every rank updates all weights itself, so that there is nothing to gather",
            remedy="set optimizer.distributed=true (NeMo: optim.distributed), or leave parallel.overlap_param_gather "
            "(minitron.parallel.overlap_param_gather) unset",
        )
    if wanted is None:
        return distributed and _has_gpu_replicas(runtime) and is_wanted(runtime)
    return wanted


def connect(wrapped: "Sequence[DistributedDataParallel]", runtime: Runtime) -> None:
    """Tell Megatron's schedules and the losses about wrapped chunks whose gradients overlap.

    Only the last micro-batch of a step sends gradients; with a pipeline all stages send at one time, so that none waits
    for another's.
    """
    config = unwrap(wrapped[0]).config
    config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
    if runtime.parallel.pipeline > 1:
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    for chunk in wrapped:
        model = unwrap(chunk)
        for parameter in model.parameters():
            # Megatron waits for autograd to bring each gradient, and takes none that was added in place.
            mark(parameter, gradient_through_autograd=True)
        if model.post_process and (weight := model.output_weight()).requires_grad:
            setattr(weight, _READY, partial(chunk.param_to_bucket_group[weight].register_grad_ready, weight))


def for_loss(weight: Tensor) -> Tensor:
    """The output weight as a fused loss takes it that fills `main_grad`; complete, and the same memory."""
    param_gather.finish_for(weight)
    if not hasattr(weight, _READY) or not torch.is_grad_enabled():
        return weight
    return weight.detach().requires_grad_()


def ready_after(total: Tensor, weight: Tensor) -> Tensor:
    """The loss itself; when its backward pass begins, the weight's gradient counts as complete."""
    ready = getattr(weight, _READY, None)
    if ready is None or not total.requires_grad:
        return total
    said: Tensor = autograd.apply(_SayReady, total, ready)
    return said


class _SayReady(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, ready: Callable[[], None]) -> Tensor:
        ctx.ready = ready
        return total.clone()  # a pipeline's schedule takes no view

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.ready()
        return grads[0], None


def _has_gpu_replicas(runtime: Runtime) -> bool:
    """Whether several GPUs hold the same weights, and so exchange gradients."""
    return runtime.device.type == "cuda" and runtime.dp_size * runtime.parallel.context > 1


def _one_or_all(functions: list[Any]) -> Any:
    """As Megatron wants them: a list only where there are several chunks."""
    return functions if len(functions) > 1 else functions[0]
