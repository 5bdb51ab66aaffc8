"""The models of the checks."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.bench import Bench
from nemo_minitron.arch.layer import LayerSpec, Mamba, Moe, transformer_layer
from nemo_minitron.arch.spec import Activation, ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.megatron import optim, runtime
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import MicroBatch, reduce_report, run
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Runtime

VOCABULARY = 1024
SMALL = ModelSpec(
    vocab_size=VOCABULARY,
    hidden_size=256,
    head_dim=64,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=512),) * 4,
    max_position_embeddings=512,
    tied_embeddings=True,
)
TINY = SMALL.with_sizes(num_layers=2, ffn_hidden_size=128)


def _experts(plain: ModelSpec) -> ModelSpec:
    """Attention with experts and a shared one, in all layers but the first."""
    mixture = Moe(num_experts=8, expert_ffn_hidden_size=64, top_k=2, shared_ffn_hidden_size=64, shared_gate=True)
    layer = LayerSpec(mixer=plain.layer.mixer, feed_forward=mixture)
    return replace(plain, layers=(plain.layer, *[layer] * (plain.num_layers - 1)))


def _hybrid(plain: ModelSpec) -> ModelSpec:
    """One part a layer: Mamba, an MLP, attention and Mamba again, without positions."""
    mixer = Mamba(mamba_num_heads=8, mamba_head_dim=64, mamba_state_dim=64, mamba_num_groups=2, chunk_size=64)
    mamba = LayerSpec(mixer=mixer, feed_forward=None)
    layers = (mamba, plain.layer.without("mixer"), plain.layer.without("feed_forward"), mamba)
    return replace(plain, layers=layers, rotary_percent=0.0, activation=Activation.SQUARED_RELU, tied_embeddings=False)


KINDS: dict[str, tuple[ModelSpec, ModelSpec]] = {
    "dense": (SMALL, TINY),
    "experts": (_experts(SMALL), _experts(TINY)),
    "hybrid": (_hybrid(SMALL), _hybrid(TINY)),
}
"""Small models by kind: on a card, and on a CPU."""


def llama(*, layers: int, hidden: int, ffn: int, heads: int, vocabulary: int = 128256) -> ModelSpec:
    """A model of Llama 3.1's shape with untied embeddings."""
    return ModelSpec(
        vocab_size=vocabulary,
        hidden_size=hidden,
        head_dim=128,
        layers=(transformer_layer(num_attention_heads=heads, num_query_groups=8, ffn_hidden_size=ffn),) * layers,
        max_position_embeddings=8192,
        rotary_base=500000.0,
        tied_embeddings=False,
    )


@dataclass
class Training:
    """A model under training, from the same weights every time."""

    here: Runtime
    chunks: list[nn.Module]
    optimizer: optim.TrainOptimizer
    batches: list[MicroBatch]
    loss: Any

    @property
    def model(self) -> MinitronGPT:
        """The chunk inside its wrapper."""
        return optim.unwrap(self.chunks[0])

    def step(self) -> float:
        """One optimizer step; the loss per token before it."""
        self.optimizer.zero_grad()
        report = reduce_report(
            run(self.chunks, self.batches, self.loss, runtime=self.here, forward_only=False), self.here
        )
        if self.optimizer.step().skipped:
            raise ValueError("the step was skipped: its gradients are not finite")
        return report["total"] / report["tokens"]

    def validate(self) -> float:
        """The loss per token, nothing changed."""
        report = run(self.chunks, self.batches, self.loss, runtime=self.here, forward_only=True)
        sums = reduce_report(report, self.here)
        return sums["total"] / sums["tokens"]


def precision(bench: Bench) -> Precision:
    """bf16 on a GPU."""
    return Precision.FP32 if bench.tiny else Precision.BF16


def start() -> Runtime:
    """This process alone."""
    return runtime.start(ParallelConfig(), seed=0)


def small(bench: Bench, kind: str = "dense") -> ModelSpec:
    """A model that trains in milliseconds."""
    return KINDS[kind][bench.tiny]


def training(bench: Bench, *, distributed: bool = False, kind: str = "dense") -> Training:
    """A small model with plain cross-entropy on eight sequences in two micro-batches."""
    from nemo_minitron.models.losses import LanguageModelLoss

    here = start()
    config = OptimizerConfig(lr=1e-3, warmup_steps=0, distributed=distributed)
    chunks = build_chunks(small(bench, kind), here, precision(bench), seed=1)
    chunks[0].output = "hidden"
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.build_optimizer(wrapped, config, precision(bench), 20)
    loss = LanguageModelLoss(model=chunks[0], vocab_size=VOCABULARY, tensor_group=None)
    return Training(here, wrapped, optimizer, batches(VOCABULARY, samples=8, length=64 if bench.tiny else 128), loss)


def batches(vocabulary: int, *, samples: int, length: int, count: int = 2, masked: bool = True) -> list[MicroBatch]:
    """The same random text every time, in `count` micro-batches; with `masked`, the last eighth does not count."""
    tokens = torch.randint(0, vocabulary, (samples, length + 1), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(samples, length, dtype=torch.bool)
    if masked:
        keep[:, -length // 8 :] = False
    return MicroBatch.of(tokens[:, :-1], tokens[:, 1:], keep).split(samples // count)


@torch.no_grad()
def fill(chunks: Iterable[nn.Module], *, by_width: bool = False) -> None:
    """Random weights made on the device: a model of billions of weights would take minutes from the CPU's generator.

    Args:
        chunks: The model.
        by_width: Divide weights by the root of the numbers that they sum, so that activations of layers of any width
            are of one size. Otherwise their deviation is 0.02.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 if by_width else 0.02)
