"""Megatron's data-parallel wrapper, optimizer and schedule behind three functions.

Parameters may be bf16; gradients are summed, clipped and applied in fp32, on fp32 master weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.training import OptimizerConfig, Schedule
from nemo_minitron.megatron.model import unwrap


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    lr: float
    """Learning rate of this step; it applies to skipped ones too."""
    skipped: bool
    """Whether the weights were left as they are because the gradients were not finite."""


def wrap(chunks: Sequence[nn.Module], config: OptimizerConfig) -> list[nn.Module]:
    """Chunks inside Megatron's data-parallel wrapper, with fp32 gradient buffers (`parameter.main_grad`).

    `forward.run` then adds gradients up over data-parallel ranks, and over the two copies of a tied embedding, and
    divides them by the number of tokens.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    parallel_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.distributed,
        check_for_nan_in_grad=False,
        average_in_collective=False,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
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
    return wrapped


class TrainOptimizer:
    """AdamW on wrapped chunks, with gradient clipping and a learning-rate schedule."""

    def __init__(self, chunks: Sequence[nn.Module], optimizer: Any, scheduler: Any, clip_grad: float) -> None:
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
    def step(self) -> StepInfo:
        """Apply the gradients that `forward.run` left; every rank calls it.

        Gradients that are not finite change no weight and no moment; the schedule moves on all the same.
        """
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        self.scheduler.step(1)
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return StepInfo(norm, lr, skipped=True)
        if self.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=self.clip_grad, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        return StepInfo(norm, lr, skipped=False)

    @property
    def steps_taken(self) -> int:
        """Optimizer steps so far, those before a resume included."""
        return int(self.scheduler.num_steps)

    def reload_weights(self) -> None:
        """Take over the model's weights as master weights, after something else has written them."""
        self.optimizer.reload_model_params()


def build_optimizer(
    chunks: Sequence[nn.Module], config: OptimizerConfig, precision: Precision, steps: int
) -> TrainOptimizer:
    """Megatron's AdamW for chunks from `wrap`, already holding their weights.

    Args:
        chunks: Wrapped chunks.
        config: Optimizer settings. One-dimensional parameters have no weight decay.
        precision: Numbers of the chunks' parameters.
        steps: Steps after which the learning rate reaches its minimum. Step 1 has `1 / warmup_steps` of the peak.
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
        use_distributed_optimizer=config.distributed,
    )
    optimizer = get_megatron_optimizer(megatron_config, list(chunks), use_gloo_process_groups=False)
    _use_fused_adam(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        # A warm-up longer than the training is a ramp that is not finished.
        lr_decay_steps=max(steps, config.warmup_steps + 1),
        lr_decay_style={Schedule.COSINE: "cosine", Schedule.LINEAR: "linear", Schedule.CONSTANT: "constant"}[
            config.schedule
        ],
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return TrainOptimizer(chunks, optimizer, scheduler, config.clip_grad)


def _use_fused_adam(optimizer: Any) -> None:
    """Let torch's AdamW, where Megatron falls back to it, update each parameter in one pass over memory."""
    for part in optimizer.chained_optimizers:
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            inner.defaults.update(fused=True, foreach=False)
            for group in inner.param_groups:
                group.update(fused=True, foreach=False)
