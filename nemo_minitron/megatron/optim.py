"""Megatron's data-parallel wrapper, optimizer and schedule behind three functions.

Parameters may be bf16; gradients are summed, clipped and applied in fp32, on fp32 master weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from nemo_minitron.config.base import in_steps
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.training import OptimizerConfig, Schedule
from nemo_minitron.megatron import optimizer_gather, overlap, param_gather
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

Wrapped: TypeAlias = "DistributedDataParallel"
"""A chunk inside Megatron's data-parallel wrapper."""

_DECAY_STYLES = {
    Schedule.COSINE: "cosine",
    Schedule.LINEAR: "linear",
    Schedule.WSD: "WSD",
    Schedule.CONSTANT: "constant",
}


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    lr: float
    """Learning rate of this step; it applies to skipped ones too."""
    skipped: bool
    """Whether weights and optimizer were left as they are, because the gradients were not finite or were refused."""


def is_distributed(config: OptimizerConfig) -> bool:
    """Whether optimizer states are split over data-parallel ranks, decided here where the settings leave it open."""
    if config.distributed is not None:
        return config.distributed
    from megatron.core import parallel_state

    return torch.cuda.is_available() and parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1


def wrap(chunks: Sequence[nn.Module], config: OptimizerConfig, *, runtime: Runtime | None = None) -> list[Wrapped]:
    """Chunks inside Megatron's data-parallel wrapper, with fp32 gradient buffers (`parameter.main_grad`).

    `forward.run` then adds gradients up over data-parallel ranks, and over the two copies of a tied embedding, and
    divides them by the number of tokens.

    Args:
        chunks: This rank's chunks of a model.
        config: Of its optimizer.
        runtime: The running layout, whose settings say whether gradients are added up while the backward pass goes on,
            and weights gathered during the next forward pass; None: they are not.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    distributed = is_distributed(config)
    parallel_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap.is_wanted(runtime),
        overlap_param_gather=overlap.gather_is_wanted(runtime, distributed=distributed),
        bucket_size=None if runtime is None else runtime.parallel.grad_bucket_size,
        use_distributed_optimizer=distributed,
        check_for_nan_in_grad=False,
        average_in_collective=False,
    )
    param_gather.disconnect(chunks)  # from the wrapper of an earlier training
    wrapped = []
    for index, chunk in enumerate(map(unwrap, chunks)):
        chunk.config.finalize_model_grads_func = finalize_model_grads
        wrapped.append(
            DistributedDataParallel(
                config=chunk.config,
                ddp_config=parallel_config,
                module=chunk,
                # Later virtual stages finish their backward pass first; only the first one is worth splitting.
                disable_bucketing=index > 0,
            )
        )
    if runtime is not None and parallel_config.overlap_grad_reduce:
        overlap.connect(wrapped, runtime)
    if parallel_config.overlap_param_gather:
        param_gather.connect(wrapped)
    return wrapped


class TrainOptimizer:
    """AdamW on wrapped chunks, with gradient clipping and a learning-rate schedule."""

    def __init__(
        self,
        chunks: Sequence[Wrapped],
        optimizer: "ChainedOptimizer",
        scheduler: "OptimizerParamScheduler",
        clip_grad: float,
    ) -> None:
        self.chunks = list(chunks)
        self.optimizer = optimizer
        """Megatron's; a list of optimizers that act as one."""
        self.scheduler = scheduler
        self.clip_grad = clip_grad

    def zero_grad(self) -> None:
        """Clear gradients before a global batch."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, refuse: Callable[[float], bool] | None = None) -> StepInfo:
        """Apply the gradients that `forward.run` left; every rank calls it.

        Gradients that are not finite change no weight and no moment; the schedule moves on all the same.

        Args:
            refuse: Asked with the gradient norm, also if that is not finite; True skips the step. Must give all ranks
                the same answer.
        """
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        self.scheduler.step(1)
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        refused = refuse(norm) if refuse is not None else False
        if refused or not math.isfinite(norm):
            return StepInfo(norm, lr, skipped=True)
        if self.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                # On a stage without experts their optimizer has none. Kernels of Transformer Engine and Apex want some.
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, max_norm=self.clip_grad, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        param_gather.begin(self.chunks)
        return StepInfo(norm, lr, skipped=False)

    @property
    def steps_taken(self) -> int:
        """Optimizer steps so far, those before a resume included."""
        return int(self.scheduler.num_steps)

    def reload_weights(self) -> None:
        """Take over the model's weights as master weights, after something else has written them."""
        self.optimizer.reload_model_params()

    def sharded_state(self, model_state: dict[str, Any], metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """Master weights, moments, step counts and schedule, sharded like the model's weights in `model_state`."""
        with optimizer_gather.gathered_once(self.optimizer):
            optimizer = self.optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
        if not loading:
            for part in _states(optimizer, len(self.optimizer.chained_optimizers)):
                if "param_state" in part and part["param_state"] is None:
                    del part["param_state"]  # gathered elsewhere; Megatron would warn that ranks differ
        return (
            {"optimizer": optimizer} if loading else {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
        )

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take up what `sharded_state` described, after it has been read: weights, moments and step counts.

        Megatron and torch would bring back the learning rate, weight decay, betas and epsilon that were stored, and the
        stored schedule, whatever is asked for now. What is asked for stays.
        """
        optimizer = state["optimizer"]
        told = [_told(group) for group in self.optimizer.param_groups]
        # Torch's AdamW keeps its step count with the moments, where Megatron's distributed optimizer, written for
        # Apex's, expects none: it is put aside while the moments are filled in.
        # Experts have an optimizer of their own, and its state a place of its own.
        parts = self.optimizer.chained_optimizers
        states = _states(optimizer, len(parts))
        is_torch = bool(_torch_adams(self.optimizer))
        moments = [each.pop("param_state", None) if is_torch else None for each in states]
        self.optimizer.load_state_dict(optimizer)
        steps = {id(moment): moment.pop("step", None) for moment in self._moments()}
        for part, found in zip(parts, moments, strict=True):
            if found is not None:
                part.load_parameter_state_from_fully_reshardable(found)
        for group, values in zip(self.optimizer.param_groups, told, strict=True):
            group.update(values)
        self.scheduler.num_steps = state["scheduler"]["num_steps"]
        self.scheduler.step(0)
        for moment in self._moments():
            step = steps[id(moment)]
            moment["step"] = torch.zeros(()) if step is None else step.detach().clone()

    def _moments(self) -> list[dict[str, Any]]:
        return [moment for adam in _torch_adams(self.optimizer) for moment in adam.state.values()]


def _states(state: dict[Any, Any], parts: int) -> list[dict[str, Any]]:
    """The state of each part of an optimizer; that of one part alone stands for itself."""
    return [state] if parts == 1 else [state[index] for index in range(parts)]


def _told(group: dict[str, Any]) -> dict[str, Any]:
    """What a group of parameters was told; Apex's optimizer keeps its step count there too."""
    return {name: value for name, value in group.items() if name not in {"params", "step"}}


def build_optimizer(
    chunks: Sequence[Wrapped],
    config: OptimizerConfig,
    precision: Precision,
    steps: int,
    *,
    constant_steps: int = 0,
) -> TrainOptimizer:
    """Megatron's AdamW for chunks from `wrap`, already holding their weights.

    Args:
        chunks: Wrapped chunks.
        config: Optimizer settings. One-dimensional parameters have no weight decay.
        precision: Numbers of the chunks' parameters.
        steps: Steps after which the learning rate reaches its minimum. Step 1 has `1 / warmup_steps` of the peak.
        constant_steps: The last of them, in which the learning rate stays at its minimum.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=precision is Precision.BF16,
        params_dtype=unwrap(chunks[0]).config.params_dtype,
        use_distributed_optimizer=is_distributed(config),
    )
    optimizer = get_megatron_optimizer(megatron_config, list(chunks), use_gloo_process_groups=False)
    _prepare_adam(optimizer)
    warmup_steps = in_steps(config.warmup_steps, steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_steps,
        # A warm-up longer than the training is a ramp that is not finished.
        lr_decay_steps=max(steps - constant_steps, warmup_steps + 1),
        lr_decay_style=_DECAY_STYLES[config.schedule],
        wsd_decay_steps=max(round(config.decay_fraction * steps), 1),
        lr_wsd_decay_style="linear",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return TrainOptimizer(chunks, optimizer, scheduler, config.clip_grad)


def _prepare_adam(optimizer: "ChainedOptimizer") -> None:
    """Make the moments now, where Adam would at its first step, so that a state can be saved or loaded before it.

    Torch's AdamW, to which Megatron falls back without Transformer Engine and Apex, is also told to update each
    parameter in one pass over memory.
    """
    for part in optimizer.chained_optimizers:
        if (inner := getattr(part, "optimizer", None)) is not None:
            part.init_state_fn(inner, part.config)
    for adam in _torch_adams(optimizer):
        adam.defaults.update(fused=True, foreach=False)
        for group in adam.param_groups:
            group.update(fused=True, foreach=False)
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }


def _torch_adams(optimizer: "ChainedOptimizer") -> list[torch.optim.Optimizer]:
    inner = [getattr(part, "optimizer", None) for part in optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]
