"""Bytes that ranks tell each other in one optimizer step, by axis of the layout, and bytes of a training checkpoint.

Equal to what the collectives of a real step move (`tests/parallel/test_estimate_traffic.py`), scalars aside: token
counts, the gradient norm, reports. Context parallelism and losses on intermediate states are left out.
"""

from dataclasses import dataclass
from enum import StrEnum

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count, weights
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute
from nemo_minitron.estimate.activations import Pass, bytes_of, own_layers
from nemo_minitron.estimate.memory import Training, expert_parameters, rank_parameters
from nemo_minitron.megatron.placement import padded_vocab

_FP32, _FP64 = 4, 8
_MOMENTS, _MASTER = 2 * _FP32, _FP32

LOSS_BYTES = 11 * _FP32 + 4 * _FP64
"""What a rank tells the others a token in the fused distillation loss.

Eleven numbers of its shard of the vocabulary, and peaks and masses of both models.
"""


class Split(StrEnum):
    """Between which ranks."""

    TENSOR = "tensor"
    EXPERT = "expert"
    PIPELINE = "pipeline"
    DATA = "data"


class Collective(StrEnum):
    """How."""

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    SEND = "send"


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What one rank takes part in during a step.

    Attributes:
        split: The axis.
        collective: The operation.
        bytes: Size of the complete tensors, all calls together: what is gathered, or what is scattered.
        ranks: Ranks in the group.
    """

    split: Split
    collective: Collective
    bytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends if the ranks form a ring (Thakur, Rabenseifner and Gropp, 2005)."""
        share = (self.ranks - 1) / self.ranks
        match self.collective:
            case Collective.ALL_REDUCE:
                return 2 * share * self.bytes
            case Collective.SEND:
                return float(self.bytes)
        return share * self.bytes


def step_traffic(
    student: ModelSpec, training: Training, stage: int, *, teacher: ModelSpec | None = None
) -> tuple[Traffic, ...]:
    """A rank of a pipeline stage in one step of training; with a teacher, of distillation by the fused loss.

    Operations over one rank are left out.
    """
    found = _tensor(student, training, stage, teacher)
    found += _experts(student, training.step, stage, trained=True)
    found += _experts(teacher, training.step, stage, trained=False) if teacher is not None else []
    found += _pipeline(student, training, stage, teacher)
    found += _data(student, training, stage)
    return tuple(each for each in found if each.bytes and each.ranks > 1)


def forward_traffic(spec: ModelSpec, step: Pass, stage: int) -> tuple[Traffic, ...]:
    """A rank of a pipeline stage in a forward pass over a step's micro-batches."""
    found = [*_layers(spec, step, stage, trained=False), *_experts(spec, step, stage, trained=False)]
    found.append(_sends(spec, step, stage, backward=False))
    return tuple(each for each in found if each.bytes and each.ranks > 1)


def checkpoint_bytes(spec: ModelSpec, precision: Precision) -> int:
    """A training checkpoint: weights, both moments, and fp32 masters of bf16 weights; headers add under a percent."""
    master = _MASTER if precision is Precision.BF16 else 0
    return parameter_count(spec) * (bytes_of(precision) + _MOMENTS + master)


def _states(spec: ModelSpec, step: Pass) -> int:
    """Bytes of the hidden states of one micro-batch, all positions and channels."""
    return step.tokens * spec.hidden_size * bytes_of(step.precision)


def _layers(spec: ModelSpec, step: Pass, stage: int, *, trained: bool) -> list[Traffic]:
    """Tensor parallelism outside of the loss: a sum per mixer and feed-forward in each direction, and the embedding's.

    A shared expert has a sum of its own, and the gradient of the router's weights is one more. What is computed again
    is added up again. Under sequence parallelism a sum becomes a gather before a block and a scattered sum behind it;
    the backward pass gathers the inputs of both blocks a second time (Korthikanti et al., arXiv:2205.05198, section
    4.2.2).

    `trained` is whether there is a backward pass.
    """
    parallel = step.parallel
    layers = [spec.layers[number] for number in own_layers(spec, parallel, stage)]
    mixers = sum(layer.mixer is not None for layer in layers)
    feed_forwards = sum(layer.feed_forward is not None for layer in layers)
    experts = [layer.moe for layer in layers if layer.has_experts]
    feed_forwards += sum(each.shared_ffn_hidden_size > 0 for each in experts)
    forward = mixers * _forward_passes(step, trained=trained, whole=True)
    forward += feed_forwards * _forward_passes(step, trained=trained, whole=False)
    backward = (mixers + feed_forwards) * trained
    first, last = int(stage == 0), int(stage == parallel.pipeline - 1)
    size = step.micro_batches * _states(spec, step)
    if not parallel.sequence_parallel:
        routed = trained * sum(each.num_experts for each in experts) * step.micro_batches * step.tokens * _FP32
        return [_on_tensor(Collective.ALL_REDUCE, (forward + backward + first) * size + routed, parallel)]
    gathered = forward + 2 * backward + first * trained + last
    return [
        _on_tensor(Collective.ALL_GATHER, gathered * size, parallel),
        _on_tensor(Collective.REDUCE_SCATTER, (forward + backward + first) * size, parallel),
    ]


def _forward_passes(step: Pass, *, trained: bool, whole: bool) -> int:
    """How often a forward pass goes through a mixer (`whole`) or a feed-forward: again where it is recomputed.

    Full recomputation does all of a layer again, the selective one its feed-forward.
    """
    again = (Recompute.FULL,) if whole else (Recompute.FULL, Recompute.SELECTIVE)
    return 2 if trained and step.parallel.recompute in again else 1


def _experts(spec: ModelSpec, step: Pass, stage: int, *, trained: bool) -> list[Traffic]:
    """Expert parallelism (`megatron.experts`): a layer gathers its group's tokens and the router's fp32 weights.

    What a rank's experts return for them is added up and scattered; the backward pass does both the other way round. A
    rank sends `ranks - 1` times its tokens a direction, whatever `top_k` is. The exchange of `megatron.engine_experts`
    sends each token to its experts alone, `top_k (ranks - 1) / ranks` times: of that, this is an upper limit.
    """
    parallel = step.parallel
    own = (spec.layers[number] for number in own_layers(spec, parallel, stage))
    layers = [layer.moe for layer in own if layer.has_experts]
    forward, backward = _forward_passes(step, trained=trained, whole=False), int(trained)
    states = len(layers) * _states(spec, step)
    weights_ = sum(each.num_experts for each in layers) * step.tokens * _FP32
    sizes = {
        Collective.ALL_GATHER: forward * (states + weights_) + backward * states,
        Collective.REDUCE_SCATTER: forward * states + backward * (states + weights_),
    }
    ranks, times = parallel.expert, parallel.expert * step.micro_batches
    return [
        Traffic(split=Split.EXPERT, collective=collective, bytes=times * size, ranks=ranks)
        for collective, size in sizes.items()
    ]


def _tensor(student: ModelSpec, training: Training, stage: int, teacher: ModelSpec | None) -> list[Traffic]:
    step = training.step
    parallel = step.parallel
    found = _layers(student, step, stage, trained=True)
    if teacher is not None:
        found += _layers(teacher, step, stage, trained=False)
    if stage == parallel.pipeline - 1:
        tokens = step.tokens * step.micro_batches
        # The gradient of the final states, added up in fp32.
        found.append(_on_tensor(Collective.ALL_REDUCE, tokens * student.hidden_size * _FP32, parallel))
        if teacher is not None:
            found.append(_on_tensor(Collective.ALL_GATHER, tokens * LOSS_BYTES * parallel.tensor, parallel))
    if parallel.sequence_parallel:
        found.append(_on_tensor(Collective.ALL_REDUCE, _replicated(student, parallel, stage) * _FP32, parallel))
    return found


def _replicated(student: ModelSpec, parallel: ParallelConfig, stage: int) -> int:
    """Elements of what each tensor-parallel rank applies to positions of its own: norms, biases, routers."""
    own, is_last = own_layers(student, parallel, stage), stage == parallel.pipeline - 1
    return sum(
        weight.numel
        for weight in weights(student)
        if (is_last if weight.layer is None else weight.layer in own)
        and Axis.HIDDEN in weight.row.axes
        and weight.row.tensor_parallel_dim is None
        and not weight.row.per_expert
    )


def _on_tensor(collective: Collective, size: int, parallel: ParallelConfig) -> Traffic:
    return Traffic(split=Split.TENSOR, collective=collective, bytes=size, ranks=parallel.tensor)


def _sends(spec: ModelSpec, step: Pass, stage: int, *, backward: bool) -> Traffic:
    """States to the next stage, and gradients to the one before."""
    parallel = step.parallel
    chunks = parallel.virtual_pipeline or 1
    forward_calls = chunks - (1 if stage == parallel.pipeline - 1 else 0)
    backward_calls = chunks - (1 if stage == 0 else 0) if backward else 0
    shares = parallel.tensor if parallel.sequence_parallel else 1
    size = (forward_calls + backward_calls) * step.micro_batches * _states(spec, step) // shares
    return Traffic(split=Split.PIPELINE, collective=Collective.SEND, bytes=size, ranks=parallel.pipeline)


def _pipeline(student: ModelSpec, training: Training, stage: int, teacher: ModelSpec | None) -> list[Traffic]:
    step = training.step
    parallel = step.parallel
    found = [_sends(student, step, stage, backward=True)]
    if teacher is not None:
        found.append(_sends(teacher, step, stage, backward=False))
    at_an_end = stage in (0, parallel.pipeline - 1)
    if parallel.pipeline > 1 and student.tied_embeddings and at_an_end and not training.freeze_embeddings:
        rows = padded_vocab(student, parallel.tensor) // parallel.tensor
        size = rows * student.hidden_size * _FP32
        found.append(Traffic(split=Split.PIPELINE, collective=Collective.ALL_REDUCE, bytes=size, ranks=2))
    return found


def _data(student: ModelSpec, training: Training, stage: int) -> list[Traffic]:
    """Gradients in fp32 over the copies of the model; the distributed optimizer scatters them and gathers weights.

    Of experts there are fewer copies: as many as there are expert-parallel groups. They have an optimizer of their own,
    and each of the two gathers all weights when it is done, unless they are gathered during the next forward pass.
    """
    step = training.step
    parallel = step.parallel
    vocabulary, others = rank_parameters(student, parallel, stage)
    experts = expert_parameters(student, parallel, stage)
    copies = training.data_parallel * parallel.context
    shared = others - experts + (0 if training.freeze_embeddings else vocabulary)
    return [
        Traffic(split=Split.DATA, collective=collective, bytes=trained * element, ranks=ranks)
        for trained, ranks in ((shared, copies), (experts, copies // parallel.expert))
        for collective, element in _of_gradients(training, optimizers=2 if experts else 1).items()
    ]


def _of_gradients(training: Training, *, optimizers: int) -> dict[Collective, int]:
    """Collectives of a step's end, and their bytes a parameter."""
    if not training.distributed_optimizer:
        return {Collective.ALL_REDUCE: _FP32}
    times = 1 if gathers_overlap(training) else optimizers
    return {Collective.REDUCE_SCATTER: _FP32, Collective.ALL_GATHER: times * bytes_of(training.step.precision)}


def gradients_overlap(training: Training) -> bool:
    """Whether gradients are sent during the backward pass (`megatron.overlap.is_wanted`, before there are ranks)."""
    parallel = training.step.parallel
    if parallel.overlap_grad_reduce is not None:
        return parallel.overlap_grad_reduce
    return bool(parallel.overlap_param_gather) or _has_gpu_replicas(training)


def gathers_overlap(training: Training) -> bool:
    """Whether weights arrive during the forward pass (`megatron.overlap.gather_is_wanted`)."""
    wanted = training.step.parallel.overlap_param_gather
    if wanted is not None:
        return wanted
    return training.distributed_optimizer and _has_gpu_replicas(training) and gradients_overlap(training)


def _has_gpu_replicas(training: Training) -> bool:
    return training.step.gpu and training.data_parallel * training.step.parallel.context > 1
