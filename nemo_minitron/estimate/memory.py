"""Bytes that a rank holds: weights, gradients, optimizer states, teacher, activations, buffers of the loss."""

from dataclasses import dataclass, replace

import torch

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weights
from nemo_minitron.config.hidden import StatePair
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute
from nemo_minitron.estimate.activations import Pass, activations, bytes_of, micro_batches_alive, own_layers
from nemo_minitron.megatron.placement import padded_vocab, state_holder
from nemo_minitron.parallel.fused_linear import block_rows, chunk_rows

_GRADIENT, _MASTER, _MOMENTS = 4, 4, 8

GPU_BYTES = {"a100": 80e9, "h100": 80e9, "h200": 141e9, "b200": 180e9}
"""Memory of a GPU, from the makers' data sheets; an A100 is taken for the larger of its two kinds."""

USABLE = 0.9
"""Share of it that a run can count on, our choice: the CUDA context, NCCL's buffers and fragmentation take the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a model is trained, as far as memory depends on it.

    Attributes:
        step: Forward and backward pass.
        data_parallel: Copies of the model.
        distributed_optimizer: Whether optimizer states are split over the copies.
        freeze_embeddings: Whether embedding and output layer take no gradients.
        teacher_precision: Numbers of a resident teacher.
        offload_teacher: Whether its layers are elsewhere while the student computes.
        chunk_tokens: Tokens whose logits exist at one time; None chooses.
        compared: Pairs of intermediate states, the teacher's and the student's.
        projection: Whether a learned matrix maps the student's to the teacher's.
    """

    step: Pass
    data_parallel: int
    distributed_optimizer: bool = False
    freeze_embeddings: bool = False
    teacher_precision: Precision = Precision.BF16
    offload_teacher: bool = False
    chunk_tokens: int | None = None
    compared: tuple[StatePair, ...] = ()
    projection: bool = False

    def recomputing(self, recompute: Recompute) -> "Training":
        """The same with other activations computed again."""
        return replace(self, step=self.step.recomputing(recompute))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on one rank at the peak of a step."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher: int = 0
    """The teacher's weights, and its states of every micro-batch, the final and those that are compared here."""
    activations: int = 0
    loss: int = 0
    """Chunks of logits, and what comparing intermediate states keeps."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations + self.loss


def rank_parameters(spec: ModelSpec, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """Parameters on any rank of a pipeline stage: those with a vocabulary dimension, and all others.

    The last stage of a model with tied embeddings holds a second copy of the embedding if it is not the first one.
    """
    layers = own_layers(spec, parallel, stage)
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    vocabulary = others = 0
    for weight in weights(spec):
        share = parallel.tensor if weight.row.tensor_parallel_dim is not None else 1
        share *= 1 if weight.expert is None else parallel.expert
        if weight.layer is not None:
            others += weight.numel // share if weight.layer in layers else 0
        elif weight.shape[0] == spec.vocab_size and len(weight.shape) == 2:
            embeds = weight.name.startswith("embedding")
            copies = (is_first and embeds) + (is_last and (spec.tied_embeddings or not embeds))
            held = min(copies, 1) if spec.tied_embeddings else copies
            vocabulary += held * padded_vocab(spec, parallel.tensor) // parallel.tensor * spec.hidden_size
        elif is_last:
            others += weight.numel
    return vocabulary, others


def expert_parameters(spec: ModelSpec, parallel: ParallelConfig, stage: int) -> int:
    """Parameters of routed experts on any rank of a pipeline stage."""
    if not spec.has_experts:
        return 0
    layers = own_layers(spec, parallel, stage)
    experts = (weight.numel for weight in weights(spec) if weight.expert is not None and weight.layer in layers)
    return sum(experts) // (parallel.tensor * parallel.expert)


def training_memory(
    student: ModelSpec, training: Training, stage: int, *, teacher: ModelSpec | None = None
) -> RankMemory:
    """What a rank of a pipeline stage holds when a step is at its peak.

    A resident teacher has the same layout.
    """
    step = training.step
    vocabulary, others = rank_parameters(student, step.parallel, stage)
    trained = others + (0 if training.freeze_embeddings else vocabulary)
    # bf16 weights have fp32 masters; fp32 weights are their own.
    per_parameter = _MOMENTS + (_MASTER if step.precision is Precision.BF16 else 0)
    copies = training.data_parallel * step.parallel.context if training.distributed_optimizer else 1
    # Of experts there are fewer copies, so that each has a larger part of their states.
    again = expert_parameters(student, step.parallel, stage) * (min(step.parallel.expert, copies) - 1)
    return RankMemory(
        weights=(vocabulary + others) * bytes_of(step.precision),
        gradients=trained * _GRADIENT,
        optimizer=(trained + again) * per_parameter // copies
        + _projection(student, teacher, training) * (_MASTER + _MOMENTS),
        teacher=0 if teacher is None else _teacher(teacher, student, training, stage),
        activations=activations(student, step, stage),
        loss=_loss(student, training, stage, models=1 if teacher is None else 2)
        + (0 if teacher is None else _comparison(student, teacher, training, stage)),
    )


def _loss(student: ModelSpec, training: Training, stage: int, *, models: int) -> int:
    step = training.step
    if stage != step.parallel.pipeline - 1:
        return 0
    element = bytes_of(step.precision)
    columns = padded_vocab(student, step.parallel.tensor) // step.parallel.tensor
    device = torch.device("cuda" if step.gpu else "cpu")
    rows = chunk_rows(step.tokens, columns, models * element, training.chunk_tokens, device)
    if step.gpu:  # Triton's kernels need no scratch
        return rows * columns * models * element
    block = block_rows(rows, columns, device, None)
    # Probabilities of a block in fp32, and its logits where they are not; the output weight's gradient goes straight
    # into Megatron's buffer.
    scratch = 4 * block * columns * (1 if element == 4 else 1 + models)
    return rows * columns * models * element + scratch


def _projection(student: ModelSpec, teacher: ModelSpec | None, training: Training) -> int:
    return student.hidden_size * teacher.hidden_size if teacher is not None and training.projection else 0


def _compared_here(student: ModelSpec, training: Training, stage: int) -> list[StatePair]:
    parallel = training.step.parallel
    return [pair for pair in training.compared if state_holder(pair[1], student.num_layers, parallel) == stage]


def _comparison(student: ModelSpec, teacher: ModelSpec, training: Training, stage: int) -> int:
    """What the losses on intermediate states keep for the backward pass, and the projection's gradient."""
    step, pairs = training.step, len(_compared_here(student, training, stage))
    # Both states in fp32; with a projection, the student's before it as well.
    widths = 4 * (student.hidden_size + teacher.hidden_size)
    if training.projection:
        widths = bytes_of(step.precision) * student.hidden_size + 8 * teacher.hidden_size
    positions = step.tokens // (step.parallel.tensor if step.parallel.sequence_parallel else 1)
    return pairs * micro_batches_alive(step, stage) * positions * widths + 4 * _projection(student, teacher, training)


def _teacher(teacher: ModelSpec, student: ModelSpec, training: Training, stage: int) -> int:
    step, element = training.step, bytes_of(training.teacher_precision)
    vocabulary, others = rank_parameters(teacher, step.parallel, stage)
    held = vocabulary + (0 if training.offload_teacher else others)
    is_last = stage == step.parallel.pipeline - 1
    compared = len({theirs for theirs, _ in _compared_here(student, training, stage)})
    parts = step.parallel.tensor if step.parallel.sequence_parallel else 1
    states = step.tokens * step.micro_batches * teacher.hidden_size
    return (held + is_last * states + compared * states // parts) * element
