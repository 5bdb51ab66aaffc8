"""Losses at the routers of a student, wherever in the pipeline they live: to be like the teacher's, and to be balanced.

Both are means over layers with experts of sums over tokens. They are taken while the student runs, and their gradient
joins its backward pass there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.layer import RouterScore
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import TrainingError
from nemo_minitron.megatron import states
from nemo_minitron.megatron.experts import experts_of
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.placement import state_holder
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.models.hidden import OnePass
from nemo_minitron.ops.routing import load_imbalance, router_divergence
from nemo_minitron.pruning.plan import PruningPlan

Take = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Which layer of the teacher a student's layer was, and which of its experts it has."""

    teacher: int
    kept: Tensor


class RouterLoss(ABC):
    """A loss at the routers of some layers.

    Args:
        student: Architecture of the student.
        layers: Numbers of its layers that have one.
        runtime: The running layout.
    """

    name: str
    """What reports call it."""

    def __init__(self, student: ModelSpec, layers: Collection[int], runtime: Runtime) -> None:
        self._student, self._layers, self._runtime = student, layers, runtime
        self._keeps: list[Tensor] = []
        """Which of this rank's positions count, `[s, b]` of each micro-batch."""
        self._sum = torch.zeros((), dtype=torch.float64, device=runtime.device)

    def expect(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Which micro-batches the next passes are over."""
        self._keeps = [states.local_keep(batch, self._runtime) for batch in micro_batches]

    def around(self, one_pass: OnePass, chunks: Sequence[nn.Module], *, weight: float) -> OnePass:
        """A pass that has the loss too: in its sums by its name, and, in training, times `weight`, in `loss`."""

        def both(*, training: bool) -> dict[str, float]:
            with self._match(chunks, weight=weight if training else None):
                report = one_pass(training=training)
            found = self._total()
            added = {"loss": report["loss"] + weight * found} if training and "loss" in report else {}
            return {**report, **added, self.name: found}

        return both

    @abstractmethod
    def _value(self, layer: int, index: int, logits_TE: Tensor, keep_SB: Tensor) -> Tensor:
        """The sum over kept tokens of micro-batch `index`, from a router's logits of positions by samples."""

    @contextmanager
    def _match(self, chunks: Sequence[nn.Module], *, weight: float | None) -> Iterator[None]:
        self._sum.zero_()
        done = dict.fromkeys(self._layers, 0)

        def take(layer: int, logits_TE: Tensor) -> Tensor | None:
            if weight is not None and not torch.is_grad_enabled():
                return None  # comes again in the backward pass, with a graph
            index = done[layer]
            done[layer] += 1
            keep_SB = self._keeps[index].to(logits_TE.device)
            loss = self._value(layer, index, logits_TE, keep_SB) / len(self._layers)
            self._sum += loss.detach()
            return None if weight is None else loss * weight

        with _watched(chunks, self._layers, take):
            yield

    def _total(self) -> float:
        """Sum of the latest pass over kept tokens of the global batch, of the mean over layers. Collective."""
        value = self._sum.clone()
        for group in (self._runtime.groups.pp, self._runtime.groups.dp_cp):
            dist.all_reduce(value, group=group)
        return float(value)

    def _is_sigmoid(self, layer: int) -> bool:
        return self._student.layers[layer].moe.score_function is RouterScore.SIGMOID


class RouterBalance(RouterLoss):
    """The load-balancing loss of a student's routers, over each sequence by itself (`ops.routing.load_imbalance`).

    Args:
        student: Its architecture.
        runtime: The running layout.

    Raises:
        TrainingError: It has no experts.
    """

    name = "balance"

    def __init__(self, *, student: ModelSpec, runtime: Runtime) -> None:
        layers = [number for number, layer in enumerate(student.layers) if layer.has_experts]
        if not layers:
            raise TrainingError("balance_weight for a model without experts", rule="routers choose experts")
        super().__init__(student, layers, runtime)

    def _value(self, layer: int, index: int, logits_TE: Tensor, keep_SB: Tensor) -> Tensor:
        logits_SBE = logits_TE.view(*keep_SB.shape, -1)
        top_k = self._student.layers[layer].moe.top_k
        return load_imbalance(logits_SBE, keep_SB, top_k=top_k, sigmoid=self._is_sigmoid(layer))


class RouterMatching(RouterLoss):
    """The KL divergence of the teacher's routers from the student's, on the same micro-batches.

    Between distributions over the experts that the student has: scores divided by their sum.

    Args:
        student: Architecture of the student.
        teacher: Architecture of the teacher.
        plan: What the student has of a first teacher; None where it carries none.
        runtime: The running layout.

    Raises:
        TrainingError: There are no experts, or which of the teacher's the student has is not known.
    """

    name = "router"

    def __init__(self, *, student: ModelSpec, teacher: ModelSpec, plan: PruningPlan | None, runtime: Runtime) -> None:
        self._teacher = teacher
        self._pairs = _pairs(student, teacher, plan)
        super().__init__(student, self._pairs, runtime)
        parallel = runtime.parallel
        self._routes = {
            pair.teacher: (
                state_holder(pair.teacher, teacher.num_layers, parallel),
                state_holder(own, student.num_layers, parallel),
            )
            for own, pair in self._pairs.items()
        }
        self._seen: dict[int, list[Tensor]] = {}
        self._targets: dict[int, Sequence[Tensor]] = {}

    @contextmanager
    def capture_teacher(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        """Keep what the teacher's routers say inside the block."""
        self._seen = {layer: [] for layer in self._routes}

        def take(layer: int, logits: Tensor) -> None:
            self._seen[layer].append(logits.detach().float())

        with _watched(chunks, self._seen, take):
            yield

    def send_targets(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Bring the teacher's logits to where they are compared. Every rank calls it."""
        self.expect(micro_batches)
        self._targets = {}
        for layer, (source, target) in sorted(self._routes.items()):
            shape = (self._keeps[0].numel(), self._teacher.layers[layer].moe.num_experts)
            like = torch.empty(shape, dtype=torch.float32, device=self._runtime.device)
            route, count = [(layer, source, target)], len(micro_batches)
            self._targets |= states.send(self._seen, route, like=like, count=count, runtime=self._runtime)
        self._seen = {}

    def _value(self, layer: int, index: int, logits_TE: Tensor, keep_SB: Tensor) -> Tensor:
        pair = self._pairs[layer]
        theirs_TE = self._targets[pair.teacher][index].index_select(1, pair.kept.to(logits_TE.device))
        return router_divergence(theirs_TE, logits_TE, keep_SB.flatten(), sigmoid=self._is_sigmoid(layer))


def _pairs(student: ModelSpec, teacher: ModelSpec, plan: PruningPlan | None) -> dict[int, _Pair]:
    """By number of a student's layer with experts."""
    fits = plan is not None and plan.spec.layers == teacher.layers and plan.student.layers == student.layers
    if plan is None or not fits:
        plan = PruningPlan.keep_all(teacher)
    if plan.student.layers != student.layers:
        raise TrainingError(
            "router_weight: which of the teacher's experts the student has is not known",
            rule="a student that was pruned from this teacher, or one of its layers and experts",
            remedy="set router_weight=0, or take the teacher that the student was pruned from",
        )
    found = {
        number: _Pair(layer.source, torch.tensor(layer.kept[Axis.EXPERT]))
        for number, layer in enumerate(plan.layers)
        if student.layers[number].has_experts
    }
    if not found:
        raise TrainingError("router_weight for a model without experts", rule="routers choose experts")
    return found


@contextmanager
def _watched(chunks: Sequence[nn.Module], layers: Collection[int], take: Take) -> Iterator[None]:
    """Inside the block, `take` sees the logits `[T, E]` of those of the layers that this rank's chunks have.

    A loss that it returns joins the model's.
    """

    def hook(layer: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def look(router: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            logits, weights = output
            return logits, states.with_loss(weights, take(layer, logits))

        return look

    handles = [
        moe.router.register_forward_hook(hook(layer.layer_number - 1))
        for chunk in map(unwrap, chunks)
        for layer in chunk.decoder.layers
        if layer.layer_number - 1 in layers and (moe := experts_of(layer)) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
