"""A loss between the routers of student and teacher, wherever in the pipeline the two live.

For each token and layer with experts: the KL divergence of the teacher's distribution over the experts that the student
has left, from the student's. A distribution is the router's scores divided by their sum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from nemo_minitron.megatron.experts import Routing, experts_of
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.placement import state_holder
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.models.hidden import OnePass
from nemo_minitron.ops.routing import router_divergence
from nemo_minitron.pruning.plan import PruningPlan

Take = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Which layer of the teacher a student's layer was, and which of its experts it has."""

    teacher: int
    kept: Tensor


class RouterMatching:
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
        self._student, self._teacher, self._runtime = student, teacher, runtime
        self._pairs = _pairs(student, teacher, plan)
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
        self._keeps: list[Tensor] = []
        self._sum = torch.zeros((), dtype=torch.float64, device=runtime.device)

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
        self._keeps = [states.local_keep(batch, self._runtime).flatten() for batch in micro_batches]
        self._targets = {}
        for layer, (source, target) in sorted(self._routes.items()):
            shape = (len(self._keeps[0]), self._teacher.layers[layer].moe.num_experts)
            like = torch.empty(shape, dtype=torch.float32, device=self._runtime.device)
            route, count = [(layer, source, target)], len(micro_batches)
            self._targets |= states.send(self._seen, route, like=like, count=count, runtime=self._runtime)
        self._seen = {}

    def around(self, one_pass: OnePass, chunks: Sequence[nn.Module], *, weight: float) -> OnePass:
        """A pass that also compares routers: `router` in its sums, and, in training, its part in `loss`."""

        def both(*, training: bool) -> dict[str, float]:
            with self._match(chunks, weight=weight if training else None):
                report = one_pass(training=training)
            found = self._total()
            added = {"loss": report["loss"] + weight * found} if training and "loss" in report else {}
            return {**report, **added, "router": found}

        return both

    @contextmanager
    def _match(self, chunks: Sequence[nn.Module], *, weight: float | None) -> Iterator[None]:
        self._sum.zero_()
        done = dict.fromkeys(self._pairs, 0)

        def take(layer: int, logits_TE: Tensor) -> Tensor | None:
            if weight is not None and not torch.is_grad_enabled():
                return None  # comes again in the backward pass, with a graph
            pair, index = self._pairs[layer], done[layer]
            done[layer] += 1
            theirs_TE = self._targets[pair.teacher][index].index_select(1, pair.kept.to(logits_TE.device))
            sigmoid = self._student.layers[layer].moe.score_function is RouterScore.SIGMOID
            keep = self._keeps[index].to(logits_TE.device)
            loss = router_divergence(theirs_TE, logits_TE, keep, sigmoid=sigmoid) / len(self._pairs)
            self._sum += loss.detach()
            return None if weight is None else loss * weight

        with _watched(chunks, self._pairs, take):
            yield

    def _total(self) -> float:
        """Sum of the latest pass over kept tokens of the global batch, of the mean over layers. Collective."""
        value = self._sum.clone()
        groups = self._runtime.groups
        # Under sequence parallelism each tensor-parallel rank routes tokens of its own.
        over = [groups.tp] if self._runtime.parallel.sequence_parallel else []
        for group in (groups.pp, groups.dp_cp, *over):
            dist.all_reduce(value, group=group)
        return float(value)


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
def _watched(chunks: Sequence[nn.Module], layers: Mapping[int, object], take: Take) -> Iterator[None]:
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
