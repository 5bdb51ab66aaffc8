"""Losses at places inside a student, wherever in the pipeline they are, alone or against what its teacher has there."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.megatron import states
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.megatron.states import Take


class OnePass(Protocol):
    """A pass of the student over the micro-batches of a step."""

    def __call__(self, *, training: bool) -> dict[str, float]:
        """Sums over all tokens of all ranks."""


class PlacedLoss(ABC):
    """Takes a loss where the student computes something, and adds its gradient to the backward pass at that place.

    The schedules and the messages between stages stay as they are. Every rank makes one.

    Args:
        runtime: The running layout.
        own: Places in the student where a loss is taken.
        groups: Over which partial sums add up to the total; each rank's part counts once.
    """

    def __init__(self, runtime: Runtime, *, own: Collection[int], groups: Sequence[dist.ProcessGroup]) -> None:
        self._runtime = runtime
        self._own, self._groups = own, groups
        self._keeps: list[Tensor] = []
        self._sum = torch.zeros((), dtype=torch.float64, device=runtime.device)

    @abstractmethod
    def _watched(
        self, chunks: Sequence[nn.Module], places: Collection[int], take: Take
    ) -> AbstractContextManager[None]:
        """Inside the block, `take` sees what this rank's chunks compute at the places; losses it returns are joined."""

    @abstractmethod
    def _loss(self, place: int, value: Tensor, micro_batch: int) -> Tensor:
        """Sum over this rank's kept tokens of a micro-batch, from its value at a place."""

    @contextmanager
    def match(self, chunks: Sequence[nn.Module], *, weight: float | None) -> Iterator[None]:
        """Take the loss of what one pass over the micro-batches computes; `total` then has the sum.

        Micro-batches come in order to every place, in the forward pass as in the backward pass that computes it again.

        `weight` is the losses' factor in the gradient; None takes none, for passes without a graph.
        """
        self._sum.zero_()
        done = dict.fromkeys(self._own, 0)

        def take(place: int, value: Tensor) -> Tensor | None:
            if weight is not None and not torch.is_grad_enabled():
                return None  # comes again in the backward pass, with a graph
            loss = self._loss(place, value, done[place])
            done[place] += 1
            self._sum += loss.detach()
            return None if weight is None else loss * weight

        with self._watched(chunks, self._own, take):
            yield

    def total(self) -> float:
        """Sum of the latest pass over places and kept tokens of the global batch. Every rank calls it."""
        value = self._sum.clone()
        for group in self._groups:
            dist.all_reduce(value, group=group)
        return float(value)


class Matching(PlacedLoss):
    """A loss against what the teacher has at places of its own.

    That travels once, after the teacher's pass, to the pipeline rank that has the student's place (`send_targets` of a
    subclass).

    Args:
        runtime: The running layout.
        theirs: Places in the teacher that are read.
        own: Places in the student where a loss is taken.
        groups: Over which partial sums add up to the total; each rank's part counts once.
    """

    def __init__(
        self, runtime: Runtime, *, theirs: Collection[int], own: Collection[int], groups: Sequence[dist.ProcessGroup]
    ) -> None:
        states.connect(runtime)
        super().__init__(runtime, own=own, groups=groups)
        self._theirs = theirs
        self._seen: dict[int, list[Tensor]] = {}
        self._targets: Mapping[int, Sequence[Tensor]] = {}

    def _as_target(self, value: Tensor) -> Tensor:
        """What is kept of a value of the teacher."""
        return value

    @contextmanager
    def capture_teacher(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        """Keep what the teacher's chunks compute inside the block, instead of what was kept before."""
        self._seen = {place: [] for place in self._theirs}

        def take(place: int, value: Tensor) -> None:
            self._seen[place].append(self._as_target(value))

        with self._watched(chunks, self._seen, take):
            yield
