"""A model small enough to prune by hand."""

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec

SPEC = ModelSpec(
    vocab_size=16,
    hidden_size=6,
    head_dim=2,
    layers=(transformer_layer(num_attention_heads=6, num_query_groups=3, ffn_hidden_size=5),) * 4,
    max_position_embeddings=8,
)
