"""What scoring, pruning, caching and distilling Llama-3.1-8B and 70B come to on 8 to 1024 H100s.

The tables of `docs/scaling.md`, out of `nemo_minitron.estimate` and the assumptions below. Nothing is measured here.

    python -m benchmarks.scaling            # print the tables
    python -m benchmarks.scaling --write    # and put them into the page
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import read_architecture
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute
from nemo_minitron.estimate.activations import Pass
from nemo_minitron.estimate.communication import Split, checkpoint_bytes, forward_traffic
from nemo_minitron.estimate.compute import PEAK_FLOPS, forward_flops, pipeline_bubble, training_flops
from nemo_minitron.estimate.memory import GPU_BYTES, USABLE, Training, training_memory
from nemo_minitron.estimate.overlap import NETWORK, NVLINK, REACHED, Exchange, Machine, communication

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/scaling.md"
BEGIN, END = "<!-- written by python -m benchmarks.scaling --write -->", "<!-- end -->"

NODE = 8
SIZES = (8, 32, 128, 512, 1024)
LENGTH, SAMPLES, TOKENS = 8192, 1024, 94e9
SCORED_SAMPLES = 1024
MFU = 0.5
SCORING_OVERHEAD = 1.06
CACHE_BYTES = 36
STORAGE, STORAGE_MOST, SAVE_EVERY = 2e9, 100e9, 250
PRUNING = (16.06e9 + 9.03e9) / 122.9

ASSUMPTIONS = (
    (
        "H100 SXM, dense bf16",
        f"{PEAK_FLOPS['h100'] / 1e12:.0f} TFLOP/s, {GPU_BYTES['h100'] / 1e9:.0f} GB",
        "data sheet",
    ),
    ("memory that a run can count on", f"{USABLE:.0%}", "ours"),
    (
        "share of the peak while a GPU computes, in every part",
        f"{MFU:.0%}",
        "ours; 38 to 43% with communication and bubble on 8,192 to 16,384 H100s (arXiv:2407.21783, table 4)",
    ),
    ("NVLink, a GPU, each way", f"{NVLINK['h100'] / 1e9:.0f} GB/s", "data sheet: 900 GB/s both ways; up to 8 GPUs"),
    ("InfiniBand, a GPU, each way", f"{NETWORK['h100'] / 1e9:.0f} GB/s", "DGX H100: one 400 Gb/s adapter a GPU"),
    ("share of either that collectives reach", f"{REACHED:.0%}", "ours"),
    (
        "communication hidden behind computation",
        "gradients: a micro-batch's backward pass; weights: a forward pass, and the teacher's; TP and PP: none",
        "the package's defaults on GPUs (`estimate/overlap.py`)",
    ),
    ("layers", "Transformer Engine, sequence parallel wherever TP > 1, distributed optimizer", "as the recipes"),
    ("training", f"{TOKENS / 1e9:.0f}B tokens, {SAMPLES} x {LENGTH} a step", "arXiv:2408.11796, table 4 (batch 1152)"),
    ("scoring", f"{SCORED_SAMPLES} x {LENGTH} tokens", "the same paper's samples; length ours"),
    ("scoring against a forward pass", f"{SCORING_OVERHEAD}", "measured, benchmarks/2026-11-24-scoring.md"),
    (
        "cached targets",
        f"{CACHE_BYTES} bytes per token at 50 draws",
        "arXiv:2503.16870: about 12 ids; 1 byte, and 3 per id; SmolLM2-135M on Wikipedia, measured: 17 ids, 52 bytes",
    ),
    (
        "storage",
        f"{STORAGE / 1e9:.0f} GB/s a node, {STORAGE_MOST / 1e9:.0f} GB/s at most; saved every {SAVE_EVERY} steps",
        "ours",
    ),
    ("pruning", f"{PRUNING / 1e9:.2f} GB/s read and written, two cores", "benchmarks/2026-11-24-large-checkpoints.md"),
)


@dataclass(frozen=True)
class Job:
    """A teacher, its student, and the layout that runs the teacher alone."""

    name: str
    teacher: ModelSpec
    student: ModelSpec
    scoring_tensor: int


@dataclass(frozen=True)
class Step:
    """A training step on some GPUs: its layout and where its seconds go."""

    training: Training
    gpus: int
    memory: float
    flops: float
    compute: float
    talk: dict[Split, Exchange]

    @property
    def hidden(self) -> float:
        """Seconds of communication that computation hides."""
        return sum(each.hidden for each in self.talk.values())

    @property
    def seconds(self) -> float:
        """Computation, and communication that it does not hide."""
        return self.compute + sum(each.exposed for each in self.talk.values())

    @property
    def hours(self) -> float:
        """Of the complete training, without saving."""
        return TOKENS / (SAMPLES * LENGTH) * self.seconds / 3600

    @property
    def utilisation(self) -> float:
        """Operations of models over what the GPUs could do; those done again do not count."""
        return self.flops / (self.seconds * self.gpus * PEAK_FLOPS["h100"])


def jobs() -> tuple[Job, ...]:
    """Both, with the widths of the Llama-3.1-Minitron-4B-Width recipe, and the same shares of the large one's."""
    small = read_architecture(ROOT / "recipes/llama3/llama31_8b.json")
    layer = transformer_layer(num_attention_heads=64, num_query_groups=8, ffn_hidden_size=28672)
    large = replace(small, hidden_size=8192, layers=(layer,) * 80)
    return (
        Job("8B", small, small.with_sizes(hidden_size=3072, ffn_hidden_size=9216), 1),
        Job("70B", large, large.with_sizes(hidden_size=6144, ffn_hidden_size=18432), 4),
    )


@cache
def step_of(job: Job, gpus: int, *, cached: bool) -> Step | None:
    """The quickest layout that fits into memory; None if none does."""
    steps = (_step(job, gpus, layout, cached=cached) for layout in _layouts(gpus))
    fitting = [step for step in steps if step is not None and step.memory <= USABLE * GPU_BYTES["h100"]]
    return min(fitting, key=lambda step: step.seconds, default=None)


def _layouts(gpus: int) -> Iterator[ParallelConfig]:
    sizes = (1, 2, 4, 8)
    for tensor, pipeline, recompute in product(sizes, sizes, Recompute):
        if tensor * pipeline <= gpus and SAMPLES % (gpus // (tensor * pipeline)) == 0:
            yield ParallelConfig(tensor=tensor, pipeline=pipeline, sequence_parallel=tensor > 1, recompute=recompute)


def _step(job: Job, gpus: int, parallel: ParallelConfig, *, cached: bool) -> Step | None:
    copies = gpus // parallel.model_parallel_size
    if copies > SAMPLES:
        return None
    step = _pass(parallel, SAMPLES // copies)
    training = Training(step=step, data_parallel=copies, distributed_optimizer=True)
    teacher = None if cached else job.teacher
    ends = {0, parallel.pipeline - 1}
    memory = max(training_memory(job.student, training, stage, teacher=teacher).total for stage in ends)
    extra = forward_flops(job.teacher, LENGTH) if teacher is not None else 0.0
    tokens = SAMPLES * LENGTH
    done = tokens * (training_flops(job.student, LENGTH, recompute=parallel.recompute) + extra)
    return Step(
        training=training,
        gpus=gpus,
        memory=memory,
        flops=tokens * (training_flops(job.student, LENGTH) + extra),
        compute=_seconds(done, gpus) / (1 - pipeline_bubble(parallel, step.micro_batches)),
        talk=_slowest(communication(job.student, training, stage, _machine(gpus), teacher=teacher) for stage in ends),
    )


def _pass(parallel: ParallelConfig, micro_batches: int) -> Pass:
    return Pass(
        parallel=parallel,
        precision=Precision.BF16,
        micro_batch_size=1,
        sequence_length=LENGTH,
        micro_batches=micro_batches,
    )


def _seconds(flops: float, gpus: int) -> float:
    return flops / (gpus * PEAK_FLOPS["h100"] * MFU)


def _machine(gpus: int) -> Machine:
    return Machine(gpu="h100", gpus=gpus, gpus_per_node=NODE, mfu=MFU)


def _slowest(stages: Iterable[dict[Split, Exchange]]) -> dict[Split, Exchange]:
    """By axis, what the pipeline stage that waits longest for it does."""
    found = list(stages)
    return {split: max((each[split] for each in found), key=lambda x: (x.exposed, x.hidden)) for split in Split}


def forward_seconds(job: Job, gpus: int, tokens: float) -> float:
    """The teacher's forward pass over so many tokens, in samples of `LENGTH`, evenly over its copies."""
    parallel = ParallelConfig(tensor=job.scoring_tensor, sequence_parallel=job.scoring_tensor > 1)
    samples = -(-tokens // (LENGTH * (gpus // job.scoring_tensor)))
    talk = sum(_machine(gpus).seconds(each, parallel) for each in forward_traffic(job.teacher, _pass(parallel, 1), 0))
    compute = _seconds(forward_flops(job.teacher, LENGTH) * LENGTH, job.scoring_tensor)
    return samples * (compute + talk)


# -- tables ----------------------------------------------------------------------------------------------------------


def tables() -> str:
    """All of them, in Markdown."""
    parts = [
        ("Assumptions", _markdown("assumption | value | source", ASSUMPTIONS)),
        ("Sizes", _sizes()),
        ("Scoring, pruning, caching", _passes()),
        ("Distilling, teacher in memory", _distilling(cached=False)),
        ("Distilling from a cache", _distilling(cached=True)),
    ]
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in parts)


def _sizes() -> str:
    rows = []
    for job in jobs():
        counts = parameter_count(job.teacher), parameter_count(job.student)
        rows.append(
            (
                f"{job.name} to {counts[1] / 1e9:.1f}B",
                f"{counts[0] / 1e9:.2f}B, {counts[1] / 1e9:.2f}B",
                f"{2 * counts[0] / 1e9:.1f} GB, {2 * counts[1] / 1e9:.1f} GB",
                f"{forward_flops(job.teacher, LENGTH) / 1e9:.1f}, {training_flops(job.student, LENGTH) / 1e9:.1f}",
                f"{checkpoint_bytes(job.student, Precision.BF16) / 1e9:.0f} GB",
                f"{CACHE_BYTES * TOKENS / 1e12:.2f} TB",
            )
        )
    return _markdown(
        "pair | parameters | bf16 weights | GFLOP per token: teacher forward, student step | checkpoint | cache",
        rows,
    )


def _passes() -> str:
    rows = []
    for job, gpus in product(jobs(), SIZES):
        written = CACHE_BYTES * TOKENS
        weights = 2 * (parameter_count(job.teacher) + parameter_count(job.student))
        rows.append(
            (
                job.name,
                f"{gpus}",
                f"{SCORING_OVERHEAD * forward_seconds(job, gpus, SCORED_SAMPLES * LENGTH):.1f} s",
                f"{weights / PRUNING / 60:.0f} min",
                f"{forward_seconds(job, gpus, TOKENS) / 3600:.1f} h",
                f"{written / (forward_seconds(job, gpus, TOKENS)) / 1e6:.0f} MB/s",
            )
        )
    return _markdown("teacher | GPUs | scoring | pruning (one CPU) | writing the cache | its stream to disk", rows)


def _distilling(*, cached: bool) -> str:
    rows = []
    for job, gpus in product(jobs(), SIZES):
        step = step_of(job, gpus, cached=cached)
        if step is None:
            rows.append((job.name, f"{gpus}", "does not fit", *[""] * 11))
            continue
        parallel = step.training.step.parallel
        disk = min(STORAGE * max(gpus // NODE, 1), STORAGE_MOST)
        saving = checkpoint_bytes(job.student, Precision.BF16) / disk
        rows.append(
            (
                job.name,
                f"{gpus}",
                f"TP {parallel.tensor}, PP {parallel.pipeline}, recompute {parallel.recompute}",
                f"{step.memory / 1e9:.0f}",
                *(f"{each:.2f}" for each in (step.compute, *_totals(step), step.hidden, step.seconds)),
                f"{step.utilisation:.0%}",
                f"{saving:.1f} s, {saving / (SAVE_EVERY * step.seconds):.1%}",
                f"{step.hours:,.0f}",
                f"{step.hours * gpus:,.0f}",
            )
        )
    headings = (
        "teacher | GPUs | layout | GB per rank | compute, s | TP, s | PP, s | DP, s | of it hidden, s | step, s | MFU "
        "| a save, its share | hours | GPU-hours"
    )
    return _markdown(headings, rows)


def _totals(step: Step) -> list[float]:
    return [step.talk[split].seconds for split in (Split.TENSOR, Split.PIPELINE, Split.DATA)]


def _markdown(headings: str, rows: Iterable[tuple[str, ...]]) -> str:
    names = [name.strip() for name in headings.split("|")]
    lines = [f"| {' | '.join(names)} |", "| " + " | ".join("---" for _ in names) + " |"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    text = tables()
    if parser.parse_args().write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
