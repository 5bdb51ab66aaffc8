"""What the last pipeline stage does with its final hidden states: next-token loss, or divergence from the teacher.

Each loss is called once a micro-batch by Megatron's schedule and returns sums over tokens, never means; the one
division by the global token count happens in Megatron's gradient finalisation and in `MegatronGPTModel`'s reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.cache.entries import SampleTargets
from nemo_minitron.cache.tensors import sparse_targets
from nemo_minitron.config.distillation import Objective
from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.megatron import overlap
from nemo_minitron.megatron.forward import LossResult, MicroBatch, context_places
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.fused_linear_cross_entropy import fused_linear_cross_entropy
from nemo_minitron.parallel.fused_linear_kd import FusedLoss, fused_linear_kd
from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd
from nemo_minitron.parallel.sparse_targets import top_k_targets


@dataclass(frozen=True, kw_only=True)
class LanguageModelLoss:
    """Cross-entropy of the next token, in nats, summed over kept tokens.

    Attributes:
        model: Chunk that owns the output layer.
        vocab_size: Real vocabulary; padded columns carry no probability.
        tensor_group: Ranks that share the vocabulary; None when it is complete.
        chunk_tokens: Tokens whose logits exist at one time; None chooses.
    """

    model: MinitronGPT
    vocab_size: int
    tensor_group: ProcessGroup | None
    chunk_tokens: int | None = None

    def __call__(self, hidden_SBH: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
        """Loss of one micro-batch from the states after the final norm, `[s, b, h]`."""
        weight = self.model.output_weight()
        result = fused_linear_cross_entropy(
            hidden_SBH.flatten(0, 1),
            overlap.for_loss(weight),
            labels=sequence_first(micro_batch.labels),
            keep=sequence_first(micro_batch.on_host.keep),
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
            tp=self.tensor_group,
            weight_gradient=main_gradient(weight),
        )
        return LossResult(
            total=overlap.ready_after(result.ce_sum, weight),
            tokens=result.tokens,
            report={"ce": result.ce_sum},
        )


@dataclass(frozen=True, kw_only=True)
class _StudentLoss:
    """What losses against a teacher share.

    Attributes:
        student: The student's chunk that owns the output layer.
        vocab_size: Real vocabulary; padded columns carry no probability.
        tensor_group: Ranks that share the vocabulary; None when it is complete.
        objective: Weights, divergence, temperature, and how many of the teacher's likeliest tokens are compared.
    """

    student: MinitronGPT
    vocab_size: int
    tensor_group: ProcessGroup | None
    objective: Objective = field(default_factory=Objective)

    def _sparse(
        self, student: Tensor, targets: SparseTargets, micro_batch: MicroBatch, *, statistics: bool = False
    ) -> FusedLoss:
        return fused_linear_sparse_kd(
            student,
            overlap.for_loss(self.student.output_weight()),
            targets,
            keep=sequence_first(micro_batch.on_host.keep),
            labels=sequence_first(micro_batch.labels),
            divergence=divergence_of(self.objective),
            kd_weight=self.objective.kd_weight,
            lm_weight=self.objective.lm_weight,
            vocab_size=self.vocab_size,
            chunk_tokens=self.objective.loss_chunk_tokens,
            tp=self.tensor_group,
            weight_gradient=main_gradient(self.student.output_weight()),
            statistics=statistics,
        )

    def _result(self, result: FusedLoss, report: dict[str, Tensor]) -> LossResult:
        total = overlap.ready_after(result.loss_sum, self.student.output_weight())
        report = {"loss": result.loss_sum.detach(), **report}
        return LossResult(total=total, tokens=result.tokens, report=report)


@dataclass(frozen=True, kw_only=True)
class DistillationLoss(_StudentLoss):
    """`kd_weight * D + lm_weight * CE`, in nats, summed over kept tokens; D is the objective's divergence.

    Attributes:
        teacher: The teacher's chunk that owns the output layer.
        teacher_states: The teacher's final hidden states `[s, b, H]` of each micro-batch, in order.
        statistics: Also report both cross-entropies and top-1 agreement (one more pass over each chunk of logits), and
            the forward KL over the full vocabulary where D is another (two more products with the output layers).
    """

    teacher: MinitronGPT
    teacher_states: Sequence[Tensor]
    statistics: bool = False

    def __call__(self, hidden_SBH: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
        """Loss of micro-batch `index` from the student's states after the final norm, `[s, b, h]`."""
        student, teacher = hidden_SBH.flatten(0, 1), self.teacher_states[index].flatten(0, 1)
        objective, divergence = self.objective, divergence_of(self.objective)
        plain = objective.top_k is None and divergence.kind is DivergenceKind.FORWARD_KL
        if objective.top_k is None:
            result = self._full(student, teacher, micro_batch, divergence, statistics=plain and self.statistics)
        else:
            result = self._sparse(student, self._top_k(teacher, objective.top_k), micro_batch)
        report = {"kl" if plain else "kd": result.kd_sum}
        if self.statistics:
            watched = result
            if not plain:
                with torch.no_grad():
                    kl = Divergence(temperature=objective.temperature)
                    watched = self._full(student, teacher, micro_batch, kl, statistics=True)
            report |= {"kl": watched.kd_sum, **watched.statistics()}
        return self._result(result, report)

    def _full(
        self, student: Tensor, teacher: Tensor, micro_batch: MicroBatch, divergence: Divergence, *, statistics: bool
    ) -> FusedLoss:
        return fused_linear_kd(
            student,
            overlap.for_loss(self.student.output_weight()),
            teacher,
            self.teacher.output_weight(),
            keep=sequence_first(micro_batch.on_host.keep),
            labels=sequence_first(micro_batch.labels),
            divergence=divergence,
            kd_weight=self.objective.kd_weight,
            lm_weight=self.objective.lm_weight,
            vocab_size=self.vocab_size,
            chunk_tokens=self.objective.loss_chunk_tokens,
            tp=self.tensor_group,
            weight_gradient=main_gradient(self.student.output_weight()),
            statistics=statistics,
        )

    def _top_k(self, teacher: Tensor, k: int) -> SparseTargets:
        return top_k_targets(
            teacher,
            self.teacher.output_weight(),
            k=k,
            vocab_size=self.vocab_size,
            temperature=self.objective.temperature,
            chunk_tokens=self.objective.loss_chunk_tokens,
            tp=self.tensor_group,
        )


@dataclass(frozen=True, kw_only=True)
class CachedDistillationLoss(_StudentLoss):
    """`kd_weight * D + lm_weight * CE` from stored targets, in nats, summed over kept tokens.

    Attributes:
        targets: Stored targets of each micro-batch's samples; the objective's temperature is theirs.
        context: This context-parallel rank, and how many there are.
    """

    targets: Sequence[Sequence[SampleTargets]]
    context: tuple[int, int] = (0, 1)

    def __call__(self, hidden_SBH: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
        """Loss of micro-batch `index` from the student's states after the final norm, `[s, b, h]`."""
        samples, length = micro_batch.tokens.shape
        rank, size = self.context
        targets = sparse_targets(
            self.targets[index],
            context_places(length * size, rank, size).expand(samples, -1),
            temperature=self.objective.temperature,
            device=hidden_SBH.device,
        )
        result = self._sparse(hidden_SBH.flatten(0, 1), targets, micro_batch, statistics=True)
        assert result.student_ce_sum is not None, "statistics and labels were given"
        return self._result(result, {"kd": result.kd_sum, "ce": result.student_ce_sum})


def divergence_of(objective: Objective) -> Divergence:
    """The formula that an objective names."""
    return Divergence(
        kind=objective.divergence, temperature=objective.temperature, beta=objective.beta, skew=objective.skew
    )


def main_gradient(weight: Tensor) -> Tensor | None:
    """Megatron's fp32 buffer for the gradient of a weight that is trained."""
    return getattr(weight, "main_grad", None)


def tensor_group(runtime: Runtime) -> ProcessGroup | None:
    """The ranks that share the vocabulary; None where it is complete, so that no collective is called."""
    return runtime.groups.tp if runtime.parallel.tensor > 1 else None


def sequence_first(batch_BS: Tensor) -> Tensor:
    """`[b, s]` to a flat `[s * b]` in the order of Megatron's hidden states."""
    return batch_BS.transpose(0, 1).reshape(-1)
