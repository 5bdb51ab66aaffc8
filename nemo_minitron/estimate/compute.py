"""Floating-point operations of a run, and the time they take at a stated utilisation."""

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_minitron.arch.layer import Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import feed_forward_count, matrix_count
from nemo_minitron.config.parallel import ParallelConfig, Recompute

PEAK_FLOPS = {"h100": 989e12, "a100": 312e12, "h200": 989e12, "b200": 2250e12}
"""Dense bf16 operations per second, from the makers' data sheets."""


def gpu_kind(name: str) -> str | None:
    """Which row of the tables a GPU belongs to, by the name that its driver gives it; None if to none.

    A name such as "NVIDIA H100 80GB HBM3". The PCIe and NVL cards of the H100 family reach less than the SXM's peak.
    """
    words = name.lower().replace("-", " ").split()
    if {"pcie", "nvl"} & set(words) and "h100" in words:
        return None
    return next((kind for kind in PEAK_FLOPS if kind in words), None)


def peak_flops_of(name: str) -> float | None:
    """`PEAK_FLOPS` of a GPU, by the name that its driver gives it; None if it is not in the table."""
    kind = gpu_kind(name)
    return None if kind is None else PEAK_FLOPS[kind]


def forward_flops(spec: ModelSpec, sequence_length: int) -> float:
    """Operations of one token's forward pass: two for every weight it meets, and attention over what came before.

    Of routed experts a token meets those that it is routed to.

    Attention reads `sequence_length / 2` positions on average, a multiplication and an addition for the score and the
    same for the weighted sum, a channel (Narayanan et al., arXiv:2104.04473, appendix). An embedding is looked up, not
    multiplied; an output layer is multiplied, tied or not.
    """
    return 2.0 * matrix_count(spec) + mixing_flops(spec, sequence_length)


def mixing_flops(spec: ModelSpec, sequence_length: int, layers: Iterable[int] | None = None) -> float:
    """Operations of one token between the projections of mixers, in some layers or in all.

    Attention: see `forward_flops`. A scan multiplies each channel with its state twice, and inside a chunk does what
    attention does over half of it (arXiv:2405.21060, section 6).
    """
    chosen = range(spec.num_layers) if layers is None else layers
    total = 0.0
    for layer in (spec.layers[index] for index in chosen):
        if isinstance(layer.mixer, Mamba):
            inner, maps = layer.mixer.inner_size, layer.mixer.map_size
            half = min(layer.mixer.chunk_size, sequence_length) / 2
            total += 4 * inner * layer.mixer.mamba_state_dim + 2 * (inner + maps) * half
        else:
            total += 4.0 * layer.on_rank(1).heads * spec.head_dim * sequence_length / 2
    return total


def training_flops(spec: ModelSpec, sequence_length: int, *, recompute: Recompute = Recompute.NONE) -> float:
    """Operations of one token's step: the backward pass costs two forward passes, recomputation up to a third one."""
    forward = forward_flops(spec, sequence_length)
    again = {
        Recompute.NONE: 0.0,
        Recompute.SELECTIVE: 2.0 * feed_forward_count(spec),
        Recompute.FULL: forward - 2.0 * spec.vocab_size * spec.hidden_size,
    }
    return 3 * forward + again[recompute]


def pipeline_bubble(parallel: ParallelConfig, micro_batches: int) -> float:
    """Share of a step's time that a pipeline stage waits, `(p - 1) / (m v + p - 1)`.

    Source: Narayanan et al., arXiv:2104.04473, sec. 2.2.
    """
    waiting = parallel.pipeline - 1
    return waiting / (micro_batches * (parallel.virtual_pipeline or 1) + waiting)


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """How long a number of operations takes on GPUs of which `mfu` of the peak is reached, 0.4 for a well-tuned job."""

    flops: float
    gpus: int
    peak: float
    mfu: float

    @property
    def hours(self) -> float:
        """Wall-clock hours."""
        return self.flops / (self.gpus * self.peak * self.mfu) / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.hours * self.gpus
