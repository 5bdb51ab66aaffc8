"""Architectures that tests of the search share."""

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec


def smollm2() -> ModelSpec:
    """SmolLM2-135M."""
    layer = transformer_layer(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536)
    return ModelSpec(
        vocab_size=49152,
        hidden_size=576,
        head_dim=64,
        layers=(layer,) * 30,
        max_position_embeddings=8192,
        tied_embeddings=True,
    )
