"""One GPU: the same model computes what the CPU computes, trains in bf16, and comes back from disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.megatron import cpu, optim, runtime, sharded_io
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import LossResult, MicroBatch, collect_logits, reduce_report, run
from nemo_minitron.megatron.runtime import Runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]

SPEC = ModelSpec(
    vocab_size=256,
    hidden_size=64,
    head_dim=32,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128),) * 2,
    max_position_embeddings=128,
    tied_embeddings=True,
)


@pytest.fixture
def here() -> Iterator[Runtime]:
    yield runtime.start(ParallelConfig(), seed=0)
    runtime.stop()


def batch() -> MicroBatch:
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    return MicroBatch.of(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 32, dtype=torch.bool))


def cross_entropy(logits: torch.Tensor, micro: MicroBatch, index: int) -> LossResult:
    per_token = torch.nn.functional.cross_entropy(logits.mT.float(), micro.labels, reduction="none")
    return LossResult((per_token * micro.keep).sum(), micro.keep.sum())


def test_no_bridge_and_the_right_device(here: Runtime) -> None:
    assert here.device.type == "cuda"
    assert not cpu.installed()
    model = build_chunks(SPEC, here, Precision.BF16, seed=1)[0]
    assert all(parameter.is_cuda for parameter in model.parameters())
    names = {weight.name for weight, _ in model.named_weights()}
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names


def test_training_and_coming_back(here: Runtime, tmp_path: Path) -> None:
    chunks = build_chunks(SPEC, here, Precision.BF16, seed=1)
    config = OptimizerConfig(lr=1e-3, warmup_steps=0)
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.build_optimizer(wrapped, config, Precision.BF16, 20)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        sums = reduce_report(run(wrapped, [batch()], cross_entropy, runtime=here, forward_only=False), here)
        losses.append(sums["total"] / sums["tokens"])
        assert not optimizer.step().skipped
    assert losses[-1] < losses[0] - 0.1
    sharded_io.save_weights(wrapped, tmp_path)
    again = build_chunks(SPEC, here, Precision.BF16)
    sharded_io.load_weights(again, tmp_path)
    for ours, theirs in zip(again[0].parameters(), chunks[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_documents_in_a_sample_are_computed_as_if_alone(here: Runtime) -> None:
    """Packed sequences where Transformer Engine is, our own attention elsewhere; in bf16, so within its rounding."""
    chunks = build_chunks(SPEC, here, Precision.BF16, trainable=False, seed=1)
    tokens = torch.randint(0, 256, (1, 96), generator=torch.Generator().manual_seed(0))
    spans = [(0, 20), (20, 21), (21, 96)]
    positions = torch.cat([torch.arange(stop - first) for first, stop in spans])[None]
    keep = torch.ones(1, 96, dtype=torch.bool)

    def logits(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        sample = MicroBatch(tokens, tokens, keep[:, : tokens.shape[1]], positions)
        (found,) = collect_logits(chunks, [sample], here)
        return found.float()

    packed, leaking = logits(tokens, positions), logits(tokens, torch.arange(96)[None])
    alone = [logits(tokens[:, first:stop], torch.arange(stop - first)[None]) for first, stop in spans]
    difference = (packed - torch.cat(alone, dim=1)).abs().max()
    assert difference < 0.02 * packed.abs().max()
    assert difference < 0.2 * (packed - leaking).abs().max()


def test_logits_are_the_cpu_s(here: Runtime) -> None:
    from nemo_minitron.megatron.functional import causal_attention, rotary_tables

    qkv = torch.randn(16, 2, 2 * 4 * 8, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(16, 1, 1, 8, generator=torch.Generator().manual_seed(1))
    on_cpu = causal_attention(qkv, rotary_tables(angles, torch.float32), groups=2, head_dim=8)
    tables = rotary_tables(angles.to(here.device), torch.float32)
    on_gpu = causal_attention(qkv.to(here.device), tables, groups=2, head_dim=8)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-5)
