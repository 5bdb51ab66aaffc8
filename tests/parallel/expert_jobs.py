"""What ranks do in the tests of experts: score a toy of transformers at some layout, or cache a teacher's targets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig, Precision

SAMPLES, LENGTH = 4, 20


@dataclass(frozen=True)
class ExpertScoreCase:
    """One scoring run."""

    folder: Path
    parallel: ParallelConfig
    micro_batch_size: int = 1
    fold: bool = False
    """Gather and deal out again after each global batch, as saving does."""


def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask `[SAMPLES, LENGTH]`; samples keep unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 256, (SAMPLES, LENGTH), generator=generator)
    keep = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0.4, 1, SAMPLES)[:, None]
    return tokens, keep


def score_experts(cases: list[ExpertScoreCase]) -> list[dict[str, torch.Tensor]]:
    return [_score(case) for case in cases]


def _score(case: ExpertScoreCase) -> dict[str, torch.Tensor]:
    from nemo_minitron.checkpoints.hf import open_hf
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch, collect_hidden
    from nemo_minitron.megatron.from_source import fill_from
    from nemo_minitron.megatron.hooks import ImportanceCollector

    here = runtime.start(case.parallel, seed=0)
    try:
        source = open_hf(case.folder)
        chunks = build_chunks(source.spec, here, Precision.FP32, trainable=False)
        fill_from(chunks, source, here)
        tokens, keep = calibration()
        mine = slice(here.dp_rank, None, here.dp_size)
        with ImportanceCollector(chunks, here, source.spec) as collector:
            batches = MicroBatch.of(tokens[mine], tokens[mine], keep[mine]).split(case.micro_batch_size)
            for batch in batches:
                collector.expect([batch.keep])
                collect_hidden(chunks, [batch], here)
                if case.fold:
                    collector.load(collector.result())
        assert all(layer.mlp.observer is None for chunk in chunks for layer in chunk.decoder.layers if _has(layer))
        return collector.result()
    finally:
        runtime.stop()


def _has(layer: torch.nn.Module) -> bool:
    return hasattr(layer.mlp, "observer")


class RandomSamples:
    """Samples of random tokens; a third of their positions do not count."""

    LENGTH, COUNT = 12, 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 94, (self.LENGTH + 1,), generator=draw)
        places = torch.arange(self.LENGTH)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": (places % 3 != index % 3).float(),
            "position_ids": places,
        }


def write_targets(folder: Path, parallel: ParallelConfig) -> list[int]:
    """Three shards of a random teacher's top 7; returns the numbers of those that this rank has written."""
    from nemo_minitron.cache.folder import CacheManifest, CacheWriter
    from nemo_minitron.config.cache import TargetKind
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.target_writer import TargetWriter
    from tests.parallel.megatron_jobs import EXPERT_SPECS

    here = runtime.start(parallel, seed=0)
    spec = EXPERT_SPECS["experts"]
    chunks = build_chunks(spec, here, Precision.FP32, trainable=False, seed=3)
    manifest = CacheManifest(
        kind=TargetKind.TOP_K,
        width=7,
        temperature=1.0,
        vocab_size=spec.vocab_size,
        samples=RandomSamples.COUNT,
        sequence_length=RandomSamples.LENGTH,
        samples_per_shard=4,
        seed=0,
        order_digest="order",
        tokenizer_digest="tokenizer",
        teacher_digest="teacher",
    )
    if here.rank == 0:
        CacheWriter(folder, manifest)
    runtime.barrier()
    writer = CacheWriter(folder, manifest)
    written: list[int] = []
    write = writer.write

    def noted(shard: int, *args: Any) -> None:
        written.append(shard)
        write(shard, *args)

    writer.write = noted
    target_writer = TargetWriter(chunks, here, writer, RandomSamples(), micro_batch_size=2)
    assert target_writer.run(stopped=lambda: False, progress=lambda shards: None)
    runtime.stop()
    return written


def cut_with_documents(parallel: ParallelConfig) -> int:
    """Micro-batches of a batch of 4 samples by 2, which on the first rank alone holds several documents a sample.

    The model says that its layers are Transformer Engine's, which take such samples one by one.
    """
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch, cut
    from tests.parallel.megatron_jobs import EXPERT_SPECS

    here = runtime.start(parallel, seed=0)
    chunks = build_chunks(EXPERT_SPECS["experts"], here, Precision.FP32, trainable=False, seed=3)
    for chunk in chunks:
        chunk.from_engine = True
    tokens = torch.zeros(4, 6, dtype=torch.long)
    positions = torch.arange(6).expand(4, -1) % (3 if here.rank == 0 else 6)
    return len(cut(MicroBatch(tokens, tokens, tokens == 0, positions), 2, chunks))
