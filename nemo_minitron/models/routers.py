"""A loss between the routers of student and teacher, wherever in the pipeline the two live.

For each token and layer with experts: the KL divergence of the teacher's distribution over the experts that the student
has left, from the student's. A distribution is the router's scores divided by their sum.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
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
from nemo_minitron.models.matching import Matching, OnePass
from nemo_minitron.ops.routing import router_divergence
from nemo_minitron.pruning.plan import PruningPlan


@dataclass(frozen=True, slots=True)
class _Pair:
    """Which layer of the teacher a student's layer was, and which of its experts it has."""

    teacher: int
    kept: Tensor


class RouterMatching(Matching):
    """Compares the routers of a student with those of its teacher on the same micro-batches.

    Args:
        student: Architecture of the student.
        teacher: Architecture of the teacher.
        plan: What the student has of a first teacher; None where it carries none.
        runtime: The running layout.

    Raises:
        TrainingError: There are no experts, or which of the teacher's the student has is not known.
    """

    def __init__(self, *, student: ModelSpec, teacher: ModelSpec, plan: PruningPlan | None, runtime: Runtime) -> None:
        self._student, self._teacher = student, teacher
        self._pairs = _pairs(student, teacher, plan)
        parallel = runtime.parallel
        self._routes = {
            pair.teacher: (
                state_holder(pair.teacher, teacher.num_layers, parallel),
                state_holder(own, student.num_layers, parallel),
            )
            for own, pair in self._pairs.items()
        }
        # Under sequence parallelism each tensor-parallel rank routes tokens of its own.
        over = [runtime.groups.pp, runtime.groups.dp_cp, *([runtime.groups.tp] * parallel.sequence_parallel)]
        super().__init__(runtime, theirs=self._routes, own=self._pairs, groups=over)

    def _watched(
        self, chunks: Sequence[nn.Module], places: Collection[int], take: Take
    ) -> AbstractContextManager[None]:
        return _watched(chunks, places, take)

    def _as_target(self, value: Tensor) -> Tensor:
        return value.detach().float()

    def send_targets(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Bring the teacher's logits to where they are compared. Every rank calls it."""
        self._keeps = [states.local_keep(batch, self._runtime).flatten() for batch in micro_batches]
        targets: dict[int, Sequence[Tensor]] = {}
        for layer, (source, target) in sorted(self._routes.items()):
            shape = (len(self._keeps[0]), self._teacher.layers[layer].moe.num_experts)
            like = torch.empty(shape, dtype=torch.float32, device=self._runtime.device)
            route, count = [(layer, source, target)], len(micro_batches)
            targets |= states.send(self._seen, route, like=like, count=count, runtime=self._runtime)
        self._seen, self._targets = {}, targets

    def around(self, one_pass: OnePass, chunks: Sequence[nn.Module], *, weight: float) -> OnePass:
        """A pass that also compares routers: `router` in its sums, and, in training, its part in `loss`."""

        def both(*, training: bool) -> dict[str, float]:
            with self.match(chunks, weight=weight if training else None):
                report = one_pass(training=training)
            found = self.total()
            added = {"loss": report["loss"] + weight * found} if training and "loss" in report else {}
            return {**report, **added, "router": found}

        return both

    def _loss(self, place: int, value: Tensor, micro_batch: int) -> Tensor:
        """Of the logits `[T, E]` of a layer's router, divided by the number of layers: the total is their mean."""
        pair = self._pairs[place]
        theirs_TE = self._targets[pair.teacher][micro_batch].index_select(1, pair.kept.to(value.device))
        sigmoid = self._student.layers[place].moe.score_function is RouterScore.SIGMOID
        keep = self._keeps[micro_batch].to(value.device)
        return router_divergence(theirs_TE, value, keep, sigmoid=sigmoid) / len(self._pairs)


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
