"""What ranks do in the tests of hybrids: score, measure depth and train a small Nemotron-H at some layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig, Precision
from tests.parallel.megatron_jobs import Case, train

SAMPLES, LENGTH = 4, 20


def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and mask; one sample is masked altogether."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 256, (SAMPLES, LENGTH + 1), generator=generator)
    keep = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.tensor([1.0, 0.6, 0.0, 0.8])[:, None]
    return tokens[:, :-1], tokens[:, 1:], keep


@dataclass(frozen=True)
class Measured:
    """What a layout measures of a checkpoint."""

    scores: dict[str, torch.Tensor]
    depth: dict[str, torch.Tensor]


def measure(folder: Path, parallel: ParallelConfig) -> Measured:
    from nemo_minitron.checkpoints.open import open_checkpoint
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.depth_metrics import DepthCollector
    from nemo_minitron.megatron.forward import MicroBatch, collect_hidden
    from nemo_minitron.megatron.hooks import ImportanceCollector
    from nemo_minitron.megatron.placement import local_shard
    from nemo_minitron.pruning.depth import candidate_blocks

    here = runtime.start(parallel, seed=0)
    try:
        source = open_checkpoint(folder)
        spec = source.spec
        chunks = build_chunks(spec, here, Precision.FP32, trainable=False)
        with torch.no_grad():
            for chunk in chunks:
                for weight, parameter in chunk.named_weights():
                    full = source.get(weight.name)
                    parameter.copy_(local_shard(weight, full, spec, rank=here.tp_rank, size=parallel.tensor))
        mine = slice(here.dp_rank, None, here.dp_size)
        batches = MicroBatch.of(*(tensor[mine] for tensor in text())).split(1)
        with ImportanceCollector(chunks, here, spec) as collector:
            collector.expect([batch.keep for batch in batches])
            collect_hidden(chunks, batches, here)
        blocks = candidate_blocks(spec.num_layers)
        depth = DepthCollector(chunks, here, spec, blocks=blocks, metrics=("lm_loss", "logit_mse"))
        for batch in batches:
            depth.add(batch)
        return Measured(collector.result(), depth.result().tensors)
    finally:
        runtime.stop()


def measure_all(folder: Path, layouts: list[ParallelConfig]) -> list[Measured]:
    return [measure(folder, parallel) for parallel in layouts]


def train_all(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case) for case in cases]
