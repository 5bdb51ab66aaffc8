"""What ranks do in the tests of experts: score a toy of transformers at some layout."""

from dataclasses import dataclass
from pathlib import Path

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
