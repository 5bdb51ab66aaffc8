"""Losses between intermediate states of student and teacher, wherever in the pipeline the two live."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.hidden import HiddenBalance, HiddenConfig
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.megatron import states
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.placement import state_holder
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.megatron.states import Take
from nemo_minitron.models.matching import Matching, OnePass
from nemo_minitron.ops.hidden_loss import dynamic_weight, hidden_loss


class StateMatching(Matching):
    """Compares states of a student with those its teacher left for the same micro-batches, any layers at any layout.

    The projection is the same on every rank and no part of the model: it has its own gradient sum and optimizer step,
    is kept in training checkpoints, and is gone when training ends.

    `optimizer` has the settings of the projection's AdamW, which are the student's; its learning rate comes with
    each step. `kept` are the teacher's channels that the student has, in order; None where they are not known.

    Attributes:
        projection: `[H, h]` fp32, from the student's `h` channels to the teacher's `H`; None for none.
        factor: What the next step's losses are multiplied by to be as large as the divergence; None before the first.

    Raises:
        ConfigError: A pair names a layer that does not exist.
        ConfigError: Hidden sizes differ, and there is to be no projection.
    """

    def __init__(
        self,
        config: HiddenConfig,
        *,
        student: ModelSpec,
        teacher: ModelSpec,
        runtime: Runtime,
        optimizer: OptimizerConfig,
        kept: Sequence[int] | None = None,
    ) -> None:
        pairs, problems = config.states(teacher.num_layers, student.num_layers)
        sizes = student.hidden_size, teacher.hidden_size
        if config.projection is False and sizes[0] != sizes[1]:
            problems.append(f"distill.hidden.projection = false: hidden sizes differ ({sizes[0]} and {sizes[1]})")
        if problems:
            raise ConfigError("recipe", problems)
        partners = {state: [other for other, own in pairs if own == state] for _, state in pairs}
        over = [runtime.groups.pp, runtime.groups.dp_cp, *([runtime.groups.tp] * runtime.parallel.sequence_parallel)]
        super().__init__(runtime, theirs=[other for other, _ in pairs], own=partners, groups=over)
        self.config = config
        self.pairs = pairs
        self.factor: float | None = None if config.balance is not HiddenBalance.NONE else 1.0
        self.projection: nn.Parameter | None = None
        self._hidden_size = teacher.hidden_size
        self._routes = _routes(pairs, teacher, student, runtime)
        self._partners = partners
        if config.projection or sizes[0] != sizes[1]:
            matrix = _first_projection(*sizes, kept, runtime.seed)
            self.projection = nn.Parameter(matrix.to(runtime.device))
            self._clip = optimizer.clip_grad
            self._optimizer = torch.optim.AdamW(
                [self.projection],
                betas=(optimizer.beta1, optimizer.beta2),
                eps=optimizer.eps,
                weight_decay=optimizer.weight_decay,
            )

    @property
    def needs_forward_first(self) -> bool:
        """Whether the balance of the coming step has to be measured before it."""
        return self.config.balance is HiddenBalance.SAME_STEP or self.factor is None

    def _watched(
        self, chunks: Sequence[nn.Module], places: Collection[int], take: Take
    ) -> AbstractContextManager[None]:
        return states.watched(chunks, places, take)

    def send_targets(self, micro_batches: Sequence[MicroBatch], dtype: torch.dtype) -> None:
        """Bring the teacher's states to where they are compared. Every rank calls it."""
        self._keeps = [states.local_keep(micro_batch, self._runtime) for micro_batch in micro_batches]
        shape = (*self._keeps[0].shape, self._hidden_size)
        like = torch.empty(shape, dtype=dtype, device=self._runtime.device)
        self._targets = states.send(
            self._seen, self._routes, like=like, count=len(micro_batches), runtime=self._runtime
        )
        self._seen = {}

    def run(self, one_pass: OnePass, chunks: Sequence[nn.Module], *, weight: float, training: bool) -> dict[str, float]:
        """Run the student once and compare its states, after `capture_teacher` and `send_targets`. Collective.

        `one_pass` is the student's, forward only unless `training`; then the balanced losses, times `weight`,
        are part of the loss.

        Returns:
            What the pass returned, with `hidden` and, if training, with their part in `loss`.
        """
        if not training:
            return self._measured(one_pass, chunks)
        if self.needs_forward_first:
            report = self._measured(one_pass, chunks)
            self.balance(_divergence(report), report["hidden"])
        # Still None where the very first batch is not finite. Its loss is not finite either, and its step is refused.
        factor = (self.factor or 0.0) * weight
        with self.match(chunks, weight=factor):
            report = one_pass(training=True)
        report["hidden"] = self.total()
        report["loss"] += factor * report["hidden"]
        self.balance(_divergence(report), report["hidden"])
        return report

    def _measured(self, one_pass: OnePass, chunks: Sequence[nn.Module]) -> dict[str, float]:
        """Forward only; the hidden loss is reported, and no part of the loss."""
        with self.match(chunks, weight=None):
            report = one_pass(training=False)
        return {**report, "hidden": self.total()}

    def balance(self, divergence: float, hidden: float) -> None:
        """Note what the same tokens gave: the sums of the divergence and of `total`.

        Of a batch where one of them is not finite nothing is noted: the next one would inherit it.
        """
        if self.config.balance is not HiddenBalance.NONE and math.isfinite(divergence) and math.isfinite(hidden):
            self.factor = float(dynamic_weight(torch.tensor(divergence), torch.tensor(hidden)))

    def step(self, *, tokens: float, lr: float, skipped: bool) -> None:
        """Update the projection with the gradient of the mean over the global batch's kept tokens. Every rank calls it.

        The learning rate is the student's, and a step that was skipped there is skipped here.
        """
        if self.projection is None:
            return
        gradient = self.projection.grad if self.projection.grad is not None else torch.zeros_like(self.projection)
        self.projection.grad = None
        if skipped:
            return
        for group in self._groups:
            dist.all_reduce(gradient, group=group)
        self.projection.grad = gradient.div_(max(tokens, 1.0))
        if self._clip > 0:
            nn.utils.clip_grad_norm_([self.projection], self._clip)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self.projection.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Balance, projection and its moments, the same on every rank, on the CPU.

        Megatron sends rank 0's copy to every rank and compares; tensors of different GPUs are never equal to it.
        """
        if self.projection is None:
            return {"factor": self.factor}
        state = {"projection": self.projection.detach(), "optimizer": self._optimizer.state_dict()}
        return {"factor": self.factor, **tree_map_only(Tensor, Tensor.cpu, state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.factor = state["factor"]
        if self.projection is not None:
            with torch.no_grad():
                self.projection.copy_(state["projection"])
            [told] = self._optimizer.param_groups
            told = {name: value for name, value in told.items() if name != "params"}
            self._optimizer.load_state_dict(state["optimizer"])
            self._optimizer.param_groups[0].update(told)  # torch brings back what was stored

    def _loss(self, place: int, value: Tensor, micro_batch: int) -> Tensor:
        keep = self._keeps[micro_batch]
        matrix = None if self.projection is None else self.projection.to(value.dtype)
        losses = [
            hidden_loss(value, self._targets[other][micro_batch], keep, matrix, kind=self.config.kind)
            for other in self._partners[place]
        ]
        return torch.stack(losses).sum()


def _divergence(report: Mapping[str, float]) -> float:
    """Sum over tokens of the divergence that the student is trained with."""
    return report["kd"] if "kd" in report else report["kl"]


def _routes(
    pairs: Sequence[tuple[int, int]], teacher: ModelSpec, student: ModelSpec, runtime: Runtime
) -> list[tuple[int, int, int]]:
    """State, source and target, each once, however many pairs it is in."""
    parallel = runtime.parallel
    wanted = {
        (
            theirs,
            state_holder(theirs, teacher.num_layers, parallel),
            state_holder(own, student.num_layers, parallel),
        )
        for theirs, own in pairs
    }
    return sorted(wanted)


def _first_projection(student: int, teacher: int, kept: Sequence[int] | None, seed: int) -> Tensor:
    """`[teacher, student]`: the student's channels in the teacher's places, or, where those are not known, random."""
    if kept is None and student == teacher:
        kept = range(student)
    if kept is None or len(kept) != student:
        generator = torch.Generator().manual_seed(seed)
        drawn: Tensor = torch.randn(teacher, student, generator=generator) / student**0.5
        return drawn
    matrix = torch.zeros(teacher, student)
    matrix[torch.tensor(list(kept)), torch.arange(student)] = 1
    return matrix
