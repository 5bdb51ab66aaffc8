"""Where a student's targets come from: a teacher in memory, one whose layers wait on the host, or a cache.

All give the same two things: what they know of the micro-batches of a step, and the loss of a student against it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_minitron.cache.entries import SampleTargets
from nemo_minitron.cache.folder import TargetCache
from nemo_minitron.config.cache import TargetKind
from nemo_minitron.config.distillation import Objective
from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.errors import CacheError
from nemo_minitron.megatron import forward
from nemo_minitron.megatron.forward import Loss, MicroBatch
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.offload import OffloadedLayers
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.models.losses import CachedDistillationLoss, DistillationLoss, tensor_group


class TargetProvider(Protocol):
    """What a teacher thinks of the samples that its student is trained on."""

    @property
    def teacher(self) -> MegatronGPTModel | None:
        """The teacher, if one is in memory."""

    def fetch(self, micro_batches: Sequence[MicroBatch], *, step: int) -> Any:
        """What the teacher knows of the micro-batches of a training step. Every rank calls it."""

    def loss(self, student: MegatronGPTModel, targets: Any, objective: Objective, *, statistics: bool) -> Loss:
        """The loss of a student against what `fetch` has returned.

        Args:
            student: Holds the output layer.
            targets: What `fetch` returned.
            objective: As it is at this step.
            statistics: Also report cross-entropies, agreement and forward KL, where they are not known anyway.
        """


class ResidentTeacher:
    """A teacher in memory, at the student's layout. It runs its own forward-only pass."""

    def __init__(self, model: MegatronGPTModel) -> None:
        self._model = model

    @property
    def teacher(self) -> MegatronGPTModel:
        """The teacher."""
        return self._model

    @property
    def chunks(self) -> list[MinitronGPT]:
        """Its chunks on this rank."""
        return self._model.chunks

    def fetch(self, micro_batches: Sequence[MicroBatch], *, step: int) -> list[Tensor]:
        """Final hidden states `[s, b, H]` of each micro-batch, on the last stage."""
        with self._on_device(), torch.no_grad():
            states: list[Tensor] = forward.collect_hidden(self.chunks, list(micro_batches), self._model.runtime)
        return states

    def loss(
        self, student: MegatronGPTModel, targets: list[Tensor], objective: Objective, *, statistics: bool
    ) -> DistillationLoss:
        """The divergence over the full vocabulary, or over the teacher's likeliest tokens."""
        return DistillationLoss(
            student=student.chunks[-1],
            teacher=self.chunks[-1],
            teacher_states=targets,
            vocab_size=student.spec.vocab_size,
            tensor_group=tensor_group(student.runtime),
            objective=objective,
            statistics=statistics,
        )

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        yield


class OffloadedTeacher(ResidentTeacher):
    """A teacher whose layers wait in host memory between its passes."""

    def __init__(self, model: MegatronGPTModel) -> None:
        super().__init__(model)
        self._layers = OffloadedLayers(model.chunks, model.runtime.device)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with self._layers.on_device():
            yield


class CachedTargets:
    """Stored targets of the training samples; no teacher is in memory.

    Args:
        folder: What the cache stage wrote.
        student: The model that learns from it. Its data are those the cache was made of, in order: every sample's
            tokens are compared with the checksum stored beside its targets.
        objective: What is asked of it.
        order: For each training sample in order, its number in the cache; None if they are the same.

    Raises:
        CacheError: There is no cache, it is incomplete or of another vocabulary, or it cannot give what the objective
            asks for.
    """

    teacher = None

    def __init__(
        self, folder: Path, student: MegatronGPTModel, objective: Objective, *, order: Sequence[int] | None = None
    ) -> None:
        self._cache, self._student, self._order = TargetCache(folder), student, order
        self._cache.check_fits(vocab_size=student.spec.vocab_size, temperature=objective.temperature)
        if self._cache.manifest.kind is TargetKind.SAMPLED and objective.divergence is not DivergenceKind.FORWARD_KL:
            raise CacheError(
                f"{folder}: divergence = {objective.divergence.value} from sampled targets",
                rule="they are unbiased for forward_kl alone",
                remedy="make a cache with cache.kind=top_k, which holds more, or take forward_kl",
            )
        self._cache.check()

    def fetch(self, micro_batches: Sequence[MicroBatch], *, step: int) -> list[list[SampleTargets]]:
        """Targets of this data-parallel rank's samples: step `g` takes samples `g * size` and following, in order.

        Only the last pipeline stage reads any.
        """
        here = self._student.runtime
        if not here.is_last_stage:
            return []
        count = sum(len(batch.tokens) for batch in micro_batches)
        first = (step * here.dp_size + here.dp_rank) * count
        found: list[list[SampleTargets]] = []
        for batch in micro_batches:
            own = range(first, first + len(batch.tokens))
            rows = batch.on_host.tokens.cpu().numpy()
            numbers = own if self._order is None else [self._order[sample] for sample in own]
            found.append([self._cache.get(number, tokens) for number, tokens in zip(numbers, rows, strict=True)])
            first = own.stop
        return found

    def loss(
        self,
        student: MegatronGPTModel,
        targets: list[list[SampleTargets]],
        objective: Objective,
        *,
        statistics: bool,
    ) -> CachedDistillationLoss:
        """The divergence over the tokens that are stored, and one for all others. The cross-entropy is always known."""
        return CachedDistillationLoss(
            student=student.chunks[-1],
            targets=targets,
            vocab_size=student.spec.vocab_size,
            tensor_group=tensor_group(student.runtime),
            objective=objective,
            context=(student.runtime.cp_rank, student.runtime.parallel.context),
        )
