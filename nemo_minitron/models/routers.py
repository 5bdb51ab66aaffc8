"""Losses at the routers of a student, wherever in the pipeline they live: to be like the teacher's, and to be balanced.

Both are means over layers with experts of sums over tokens. They are taken while the student runs, and their gradient
joins its backward pass there.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.layer import RouterScore
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import TrainingError
from nemo_minitron.megatron import states
from nemo_minitron.megatron.experts import Routing, experts_of
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.placement import state_holder
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.megatron.states import Take
from nemo_minitron.models.matching import Matching, OnePass, PlacedLoss
from nemo_minitron.ops.routing import load_imbalance, router_divergence
from nemo_minitron.pruning.plan import PruningPlan


@dataclass(frozen=True, slots=True)
class _Pair:
    """Which layer of the teacher a student's layer was, and which of its experts it has."""

    teacher: int
    kept: Tensor


class RouterLoss(PlacedLoss):
    """A loss at the routers of some layers of a student, a mean over them; the layers are its places."""

    name: str
    """What reports call it."""
    _student: ModelSpec

    def expect(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Which micro-batches the next passes are over."""
        device = self._runtime.device
        self._keeps = [states.local_keep(batch, self._runtime).to(device, non_blocking=True) for batch in micro_batches]

    def around(self, one_pass: OnePass, chunks: Sequence[nn.Module], *, weight: float) -> OnePass:
        """A pass that has the loss too: in its sums by its name, and, in training, times `weight`, in `loss`."""

        def both(*, training: bool) -> dict[str, float]:
            with self.match(chunks, weight=weight if training else None):
                report = one_pass(training=training)
            found = self.total()
            added = {"loss": report["loss"] + weight * found} if training and "loss" in report else {}
            return {**report, **added, self.name: found}

        return both

    @abstractmethod
    def _value(self, layer: int, index: int, logits_TE: Tensor, keep_SB: Tensor) -> Tensor:
        """The sum over kept tokens of micro-batch `index`, from a router's logits of positions by samples."""

    def _watched(
        self, chunks: Sequence[nn.Module], places: Collection[int], take: Take
    ) -> AbstractContextManager[None]:
        return _watched(chunks, places, take)

    def _loss(self, place: int, value: Tensor, micro_batch: int) -> Tensor:
        return self._value(place, micro_batch, value, self._keeps[micro_batch]) / len(self._own)

    def _is_sigmoid(self, layer: int) -> bool:
        return self._student.layers[layer].moe.score_function is RouterScore.SIGMOID


class RouterBalance(RouterLoss):
    """The load-balancing loss of a student's routers, over each sequence by itself (`ops.routing.load_imbalance`).

    Args:
        student: Its architecture.
        runtime: The running layout.

    Raises:
        TrainingError: It has no experts, or ranks have parts of a sequence.
    """

    name = "balance"

    def __init__(self, *, student: ModelSpec, runtime: Runtime) -> None:
        layers = [number for number, layer in enumerate(student.layers) if layer.has_experts]
        if not layers:
            raise TrainingError("balance_weight for a model without experts", rule="routers choose experts")
        if split := runtime.parallel.split_positions:
            raise TrainingError(
                f"balance_weight with {split}", rule="the load is that of a sequence, which one rank has as a whole"
            )
        super().__init__(runtime, own=layers, groups=_groups(runtime))
        self._student = student

    def _value(self, layer: int, index: int, logits_TE: Tensor, keep_SB: Tensor) -> Tensor:
        logits_SBE = logits_TE.view(*keep_SB.shape, -1)
        top_k = self._student.layers[layer].moe.top_k
        return load_imbalance(logits_SBE, keep_SB, top_k=top_k, sigmoid=self._is_sigmoid(layer))


class RouterMatching(RouterLoss, Matching):
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
        self._student, self._teacher = student, teacher
        self._pairs = _pairs(student, teacher, plan, runtime.device)
        parallel = runtime.parallel
        self._routes = {
            pair.teacher: (
                state_holder(pair.teacher, teacher.num_layers, parallel),
                state_holder(own, student.num_layers, parallel),
            )
            for own, pair in self._pairs.items()
        }
        super().__init__(runtime, theirs=self._routes, own=self._pairs, groups=_groups(runtime))

    def _as_target(self, value: Tensor) -> Tensor:
        return value.detach().float()

    def send_targets(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Bring the teacher's logits to where they are compared. Every rank calls it."""
        self.expect(micro_batches)
        targets: dict[int, Sequence[Tensor]] = {}
        for layer, (source, target) in sorted(self._routes.items()):
            shape = (self._keeps[0].numel(), self._teacher.layers[layer].moe.num_experts)
            like = torch.empty(shape, dtype=torch.float32, device=self._runtime.device)
            route, count = [(layer, source, target)], len(micro_batches)
            targets |= states.send(self._seen, route, like=like, count=count, runtime=self._runtime)
        self._seen, self._targets = {}, targets

    def _value(self, layer: int, index: int, logits_TE: Tensor, keep_SB: Tensor) -> Tensor:
        pair = self._pairs[layer]
        theirs_TE = self._targets[pair.teacher][index].index_select(1, pair.kept)
        return router_divergence(theirs_TE, logits_TE, keep_SB.flatten(), sigmoid=self._is_sigmoid(layer))


def _groups(runtime: Runtime) -> list[dist.ProcessGroup]:
    """Over which sums of routers' losses add up; under sequence parallelism each rank routes tokens of its own."""
    return [runtime.groups.pp, runtime.groups.dp_cp, *([runtime.groups.tp] * runtime.parallel.sequence_parallel)]


def _pairs(student: ModelSpec, teacher: ModelSpec, plan: PruningPlan | None, device: torch.device) -> dict[int, _Pair]:
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
        number: _Pair(layer.source, torch.tensor(layer.kept[Axis.EXPERT], device=device))
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

    def hook(layer: int) -> Callable[..., Routing]:
        def look(router: nn.Module, args: object, output: Routing) -> Routing:
            return output._replace(weights=states.with_loss(output.weights, take(layer, output.logits)))

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
