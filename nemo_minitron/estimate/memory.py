"""Bytes that a rank holds: weights, gradients, optimizer states, activations, buffers of the loss.

What a layer keeps for its backward pass is counted tensor by tensor, for the local layers of `megatron.layers` (checked
against what a real step saves) and for Transformer Engine's (after Korthikanti et al., arXiv:2205.05198, sec. 4, with
the fused attention kernel, which keeps no scores).
"""

from dataclasses import dataclass

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.arch.weights import weights
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.megatron.placement import chunk_layers, padded_vocab
from nemo_minitron.parallel.fused_linear import chunk_rows

_GRADIENT, _MASTER, _MOMENTS = 4, 4, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a student is trained, as far as memory depends on it.

    Attributes:
        parallel: The layout.
        data_parallel: Copies of the model.
        precision: Numbers of weights and activations.
        optimizer: Whether its states are split over the copies.
        micro_batch_size: Samples of a forward pass.
        sequence_length: Tokens of a sample.
        micro_batches: Forward passes of a step on one rank.
        freeze_embeddings: Whether embedding and output layer take no gradients.
        recompute: Whether layers run forward a second time instead of keeping activations.
        engine: Whether layers are Transformer Engine's.
    """

    parallel: ParallelConfig
    data_parallel: int
    precision: Precision
    optimizer: OptimizerConfig
    micro_batch_size: int
    sequence_length: int
    micro_batches: int
    freeze_embeddings: bool = False
    recompute: bool = False
    engine: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.sequence_length // self.parallel.context


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on one rank at the peak of a step."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    """Chunks of logits, and the gradients that the fused loss makes in its forward pass."""
    teacher: int = 0
    """The teacher's weights, and its final states of every micro-batch."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.teacher


def rank_parameters(spec: ModelSpec, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """Parameters on any rank of a pipeline stage: those with a vocabulary dimension, and all others.

    The last stage of a model with tied embeddings holds a second copy of the embedding if it is not the first one.
    """
    count = parallel.pipeline * (parallel.virtual_pipeline or 1)
    ranges = chunk_layers(spec.num_layers, parallel)
    layers = {layer for index in range(stage, count, parallel.pipeline) for layer in ranges[index]}
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    vocabulary = others = 0
    for weight in weights(spec):
        share = parallel.tensor if weight.row.tensor_parallel_dim is not None else 1
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


def layer_activations(spec: ModelSpec, sizes: LayerSpec, training: Training) -> int:
    """Bytes that one layer keeps for the backward pass of one micro-batch.

    Shapes in comments are a token's: H hidden, q query channels, k channels of all keys, F neurons of this rank.
    """
    tensor = training.parallel.tensor
    element = 2 if training.precision is Precision.BF16 else 4
    hidden = spec.hidden_size
    # Under sequence parallelism a rank keeps its own positions of what is not split by channels.
    outside = hidden // tensor if training.parallel.sequence_parallel else hidden
    if training.recompute:
        return training.tokens * outside * element
    queries = sizes.num_attention_heads * spec.head_dim // tensor
    keys = sizes.num_query_groups * spec.head_dim // tensor
    neurons = sizes.ffn_hidden_size // tensor
    gate_up = neurons * (2 if spec.activation.gated else 1)
    # Norm: its input (Transformer Engine), or the normed states in fp32 (ours). Linear: the norm's output.
    norms = 2 * (outside * (element if training.engine else 4) + 4 + outside * element)
    if training.engine:
        # q + 2k as they come, attention's output [q], one fp32 number a head, which is the next linear's input too.
        attention = (queries + 2 * keys + queries) * element + 4 * queries // spec.head_dim
        mlp = (gate_up + neurons) * element
    else:
        # q + 2k as they come, q + k rotated, attention's output [q].
        attention = (queries + 2 * keys + queries + keys + queries) * element
        # [gate; up], act(gate) and the product, which is the next linear's input; ungated: relu(x) and its square.
        mlp = (gate_up + (2 if spec.activation.gated else 1) * neurons) * element
    return training.tokens * (norms + attention + mlp)


def training_memory(
    student: ModelSpec, training: Training, stage: int, *, teacher: ModelSpec | None = None
) -> RankMemory:
    """What a rank of a pipeline stage holds when a step is at its peak.

    Args:
        student: The model in training.
        training: How it is trained.
        stage: Pipeline stage, from 0.
        teacher: A resident teacher at the same layout; None for none.
    """
    parallel, precision = training.parallel, training.precision
    element = 2 if precision is Precision.BF16 else 4
    vocabulary, others = rank_parameters(student, parallel, stage)
    trained = others + (0 if training.freeze_embeddings else vocabulary)
    # bf16 weights have fp32 masters; fp32 weights are their own.
    per_parameter = _MOMENTS + (_MASTER if precision is Precision.BF16 else 0)
    copies = training.data_parallel if training.optimizer.distributed else 1
    return RankMemory(
        weights=(vocabulary + others) * element,
        gradients=trained * _GRADIENT,
        optimizer=trained * per_parameter // copies,
        activations=_activations(student, training, stage),
        loss=_loss(student, training, stage, with_teacher=teacher is not None),
        teacher=0 if teacher is None else _teacher(teacher, training, stage),
    )


def _activations(student: ModelSpec, training: Training, stage: int) -> int:
    parallel = training.parallel
    chunks = parallel.virtual_pipeline or 1
    ranges = chunk_layers(student.num_layers, parallel)
    own = [ranges[index] for index in range(stage, parallel.pipeline * chunks, parallel.pipeline)]
    kept = sum(layer_activations(student, student.layers[layer], training) for layers in own for layer in layers)
    # 1F1B keeps as many micro-batches alive as there are stages from here to the end; interleaving, of each chunk,
    # some more (Narayanan et al., arXiv:2104.04473, sec. 2.2).
    alive = min(training.micro_batches, parallel.pipeline - stage)
    if chunks > 1:
        warm_up = 2 * (parallel.pipeline - stage - 1) + (chunks - 1) * parallel.pipeline + 1
        alive_chunks = min(training.micro_batches * chunks, warm_up)
        kept, alive = -(-kept * alive_chunks // chunks), 1
    element = 2 if training.precision is Precision.BF16 else 4
    # One layer's worth is computed again at a time.
    again = 0
    if training.recompute and own:
        whole = Training(**{name: getattr(training, name) for name in Training.__slots__} | {"recompute": False})
        again = max(layer_activations(student, student.layers[layer], whole) for layers in own for layer in layers)
    final = training.tokens * student.hidden_size * (4 + element) if stage == parallel.pipeline - 1 else 0
    return kept * alive + again + final


def _loss(student: ModelSpec, training: Training, stage: int, *, with_teacher: bool) -> int:
    if stage != training.parallel.pipeline - 1:
        return 0
    element = 2 if training.precision is Precision.BF16 else 4
    columns = padded_vocab(student, training.parallel.tensor) // training.parallel.tensor
    models = 2 if with_teacher else 1
    rows = chunk_rows(training.tokens, columns, models * element, None)
    logits = rows * columns * models * element
    d_hidden = training.tokens * student.hidden_size * element
    d_weight = 0 if training.freeze_embeddings else columns * student.hidden_size * element
    return logits + d_hidden + d_weight


def _teacher(teacher: ModelSpec, training: Training, stage: int) -> int:
    element = 2 if training.precision is Precision.BF16 else 4
    held = sum(rank_parameters(teacher, training.parallel, stage)) * element
    states = training.tokens * training.micro_batches * teacher.hidden_size * element
    return held + (states if stage == training.parallel.pipeline - 1 else 0)
