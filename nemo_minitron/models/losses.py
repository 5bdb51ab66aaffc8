"""What the last pipeline stage does with its final hidden states: next-token loss, or KL to the teacher.

Each loss is called once a micro-batch by Megatron's schedule and returns sums over tokens, never means; the one
division by the global token count happens in Megatron's gradient finalisation and in `MegatronGPTModel`'s reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.megatron.forward import LossResult, MicroBatch
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.parallel.fused_linear_cross_entropy import fused_linear_cross_entropy
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd


@dataclass(frozen=True, kw_only=True)
class LanguageModelLoss:
    """Cross-entropy of the next token, in nats, summed over kept tokens.

    Attributes:
        model: Chunk that owns the output layer.
        vocab_size: Real vocabulary; padded columns carry no probability.
        tensor_group: Ranks that share the vocabulary; None when it is whole.
        chunk_tokens: Tokens whose logits exist at one time; None chooses.
    """

    model: MinitronGPT
    vocab_size: int
    tensor_group: ProcessGroup | None
    chunk_tokens: int | None = None

    def __call__(self, hidden_SBH: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
        """Loss of one micro-batch from the states after the final norm, `[s, b, h]`."""
        result = fused_linear_cross_entropy(
            hidden_SBH.flatten(0, 1),
            self.model.output_weight(),
            labels=sequence_first(micro_batch.labels),
            keep=sequence_first(micro_batch.keep),
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
            tp=self.tensor_group,
        )
        return LossResult(
            total=result.ce_sum,
            tokens=result.tokens,
            report={"ce": result.ce_sum},
        )


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """`kd_weight * KL + lm_weight * CE` over the full vocabulary, in nats, summed over kept tokens.

    Attributes:
        student: The student's chunk that owns the output layer.
        teacher: The teacher's.
        teacher_states: The teacher's final hidden states `[s, b, H]` of each micro-batch, in order.
        temperature: Divides both models' logits; its square multiplies the KL.
        kd_weight: Factor of the forward KL from teacher to student.
        lm_weight: Factor of the student's next-token cross-entropy.
        statistics: Also report both cross-entropies and top-1 agreement (one more pass over each chunk of logits).
    """

    student: MinitronGPT
    teacher: MinitronGPT
    teacher_states: Sequence[Tensor]
    vocab_size: int
    tensor_group: ProcessGroup | None
    temperature: float = 1.0
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    chunk_tokens: int | None = None
    statistics: bool = False

    def __call__(self, hidden_SBH: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
        """Loss of micro-batch `index` from the student's states after the final norm, `[s, b, h]`."""
        result = fused_linear_kd(
            hidden_SBH.flatten(0, 1),
            self.student.output_weight(),
            self.teacher_states[index].flatten(0, 1),
            self.teacher.output_weight(),
            keep=sequence_first(micro_batch.keep),
            labels=sequence_first(micro_batch.labels),
            divergence=Divergence(temperature=self.temperature),
            kd_weight=self.kd_weight,
            lm_weight=self.lm_weight,
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
            tp=self.tensor_group,
            statistics=self.statistics,
        )
        report = {"loss": result.loss_sum.detach(), "kl": result.kd_sum}
        if self.statistics:
            report["ce"] = result.student_ce_sum
            report["teacher_ce"] = result.teacher_ce_sum
            report["agreement"] = result.top1_agreement
        return LossResult(total=result.loss_sum, tokens=result.tokens, report=report)


def tensor_group(runtime: Runtime) -> ProcessGroup | None:
    """The ranks that share the vocabulary; None where it is whole, so that no collective is called."""
    return runtime.groups.tp if runtime.parallel.tensor > 1 else None


def sequence_first(batch_BS: Tensor) -> Tensor:
    """`[b, s]` to a flat `[s * b]` in the order of Megatron's hidden states."""
    return batch_BS.transpose(0, 1).reshape(-1)
