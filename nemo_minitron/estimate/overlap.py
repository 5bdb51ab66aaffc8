"""Seconds that a rank spends on communication in a step, and how many of them pass while it computes.

Gradients and weights travel in buckets. Those of gradients are sent during the last micro-batch's backward pass, all
but the last one, which is complete when that pass ends. Those of weights arrive during the first micro-batch's forward
pass, all but the first one, without which it cannot begin; a teacher's pass, which comes before, hides that one too.
A later pipeline stage has a bucket a model chunk, and waits for earlier stages before its first micro-batch and after
its last one: what it sends then costs nothing either. Under the interleaved schedule stages exchange activations while
they compute, but for those that fill the pipeline. Tensor and expert parallelism, and Mamba's context parallelism, are
never hidden.

Speeds of wires are data sheets' and assumptions; latency is left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import matrix_count
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.estimate.activations import own_layers
from nemo_minitron.estimate.communication import (
    Collective,
    Split,
    Traffic,
    gathers_overlap,
    gradients_overlap,
    step_traffic,
)
from nemo_minitron.estimate.compute import PEAK_FLOPS, forward_flops, mixing_flops, training_flops
from nemo_minitron.estimate.memory import Training, rank_parameters

NVLINK = {"a100": 300e9, "h100": 450e9, "h200": 450e9, "b200": 900e9}
"""Bytes a second that a GPU sends to others of its node, one way, from the makers' data sheets."""
NETWORK = {"a100": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9}
"""Between nodes: a network adapter a GPU, as in the makers' DGX systems (200 and 400 Gb/s)."""
REACHED = 0.7
"""Fraction of either that collectives reach, our choice."""
_BUCKET, _BUCKET_A_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What computes and carries.

    Attributes:
        gpu: Kind of GPU, a key of the tables.
        gpus: How many there are.
        gpus_per_node: How many of them are joined by NVLink.
        mfu: Fraction of the peak that they reach while they compute.
    """

    gpu: str
    gpus: int
    gpus_per_node: int
    mfu: float

    def seconds(self, traffic: Traffic, parallel: ParallelConfig) -> float:
        """Time of an exchange at the speed of its slowest wire.

        Tensor-parallel ranks are neighbours, and their groups of an expert- or context-parallel group are, too.
        """
        spans = {Split.TENSOR: parallel.tensor, Split.EXPERT: parallel.tensor * parallel.expert}
        spans[Split.CONTEXT] = parallel.tensor * parallel.context
        span = spans.get(traffic.split, self.gpus)
        wire = (NVLINK if span <= self.gpus_per_node else NETWORK)[self.gpu]
        return traffic.sent / (wire * REACHED)


class Exchange(NamedTuple):
    """Seconds of a step that a rank exchanges data along one axis of the layout."""

    hidden: float
    """Those in which it computes at the same time, or would wait for another stage anyway."""
    exposed: float
    """The others."""

    @property
    def seconds(self) -> float:
        """Both."""
        return self.hidden + self.exposed


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Seconds that a pipeline stage computes.

    Attributes:
        forward: A micro-batch's forward pass through all of its model chunks.
        backward: The backward pass, with what it computes again.
        teacher: The teacher's pass over all micro-batches of a step.
    """

    forward: float
    backward: float
    teacher: float


def communication(
    student: ModelSpec, training: Training, stage: int, machine: Machine, *, teacher: ModelSpec | None = None
) -> dict[Split, Exchange]:
    """A rank of a pipeline stage in one step of training, by axis; with a teacher, of distillation."""
    parallel = training.step.parallel
    chunks = parallel.virtual_pipeline or 1
    passes = passes_of(student, training, stage, machine, teacher=teacher)
    apart = bucket_fraction(student, training, stage)
    found = dict.fromkeys(Split, Exchange(0.0, 0.0))
    for traffic in step_traffic(student, training, stage, teacher=teacher):
        seconds = machine.seconds(traffic, parallel)
        hidden = 0.0
        if traffic.split is Split.DATA and _overlaps(traffic, training):
            hidden = _hidden_buckets(traffic, seconds, passes, apart=apart, waits=stage / chunks)
        elif traffic.collective is Collective.SEND and _sends_overlap(training):
            filling = (parallel.pipeline - 1) / (training.step.micro_batches * chunks)
            hidden = seconds * max(1 - filling, 0.0)
        before = found[traffic.split]
        found[traffic.split] = Exchange(before.hidden + hidden, before.exposed + seconds - hidden)
    return found


def passes_of(
    student: ModelSpec, training: Training, stage: int, machine: Machine, *, teacher: ModelSpec | None = None
) -> Passes:
    """Seconds that a rank of a pipeline stage computes."""
    step = training.step
    length = step.sequence_length
    rate = PEAK_FLOPS[machine.gpu] * machine.mfu
    tokens = step.micro_batch_size * length / (step.parallel.tensor * step.parallel.context)
    forward = tokens * _stage_flops(student, step.parallel, stage, length) / rate
    again = training_flops(student, length, recompute=step.parallel.recompute) / forward_flops(student, length) - 1
    of_teacher = 0.0
    if teacher is not None:
        of_teacher = step.micro_batches * tokens * _stage_flops(teacher, step.parallel, stage, length) / rate
    return Passes(forward=forward, backward=again * forward, teacher=of_teacher)


def bucket_fraction(student: ModelSpec, training: Training, stage: int) -> float:
    """The part of a rank's gradients or weights that is in the bucket next to the model's input.

    Megatron cuts the first chunk of the first pipeline stage into buckets; every other chunk is one.
    """
    parallel = training.step.parallel
    vocabulary, others = rank_parameters(student, parallel, stage)
    trained = others + (0 if training.freeze_embeddings else vocabulary)
    chunk = trained / (parallel.virtual_pipeline or 1)
    size = parallel.grad_bucket_size or max(_BUCKET, _BUCKET_A_RANK * training.data_parallel * parallel.context)
    return min(size if stage == 0 else chunk, chunk) / trained


def _hidden_buckets(traffic: Traffic, seconds: float, passes: Passes, *, apart: float, waits: float) -> float:
    """Hidden seconds of gradients or weights.

    Args:
        traffic: Which of them.
        seconds: All of them.
        passes: What the stage computes.
        apart: The fraction that is in the bucket next to the model's input.
        waits: Micro-batches' passes for which the stage waits, before its first one and after its last one.
    """
    if traffic.collective is Collective.ALL_GATHER:
        during, beside = passes.forward, passes.teacher + waits * passes.forward
    else:
        during, beside = passes.backward, waits * passes.backward
    return min(seconds * (1 - apart), during) + min(seconds * apart, beside)


def _overlaps(traffic: Traffic, training: Training) -> bool:
    gathers = traffic.collective is Collective.ALL_GATHER
    return gathers_overlap(training) if gathers else gradients_overlap(training)


def _sends_overlap(training: Training) -> bool:
    parallel = training.step.parallel
    return training.step.gpu and parallel.virtual_pipeline is not None and parallel.overlap_p2p_comm is not False


def _stage_flops(spec: ModelSpec, parallel: ParallelConfig, stage: int, length: int) -> float:
    """A token's forward pass through the layers of a pipeline stage, and on the last one through the output layer."""
    layers = own_layers(spec, parallel, stage)
    matrices = matrix_count(spec, layers, output_layer=stage == parallel.pipeline - 1)
    return 2.0 * matrices + mixing_flops(spec, length, layers)
