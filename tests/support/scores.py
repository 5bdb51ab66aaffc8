"""Sums of scores, made up."""

import torch
from torch import Tensor

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.pruning.scores import site_names

SPEC = ModelSpec(
    vocab_size=16,
    hidden_size=6,
    head_dim=2,
    layers=(
        transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=5),
        transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=3),
    ),
    max_position_embeddings=8,
)


def sums(spec: ModelSpec = SPEC, *, samples: int = 3, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums as a score file holds them, and the statistics of single samples `[samples, channels]` they come from."""
    generator = torch.Generator().manual_seed(seed)
    found = {"samples": torch.tensor(float(samples)).double(), "tokens": torch.tensor(10.0 * samples).double()}
    single = {}
    for layer, site, channels in site_names(spec):
        for kind in ("mean", "l2", "var"):
            values = torch.rand(samples, channels, generator=generator, dtype=torch.float64)
            single[f"layers.{layer}.{site}.{kind}"] = values
            found[f"layers.{layer}.{site}.{kind}.sum"] = values.sum(0)
            found[f"layers.{layer}.{site}.{kind}.sumsq"] = values.square().sum(0)
    for layer in range(spec.num_layers):
        found[f"layers.{layer}.block_influence.sum"] = torch.rand((), generator=generator, dtype=torch.float64)
    return found, single
