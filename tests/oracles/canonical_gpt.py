"""A GPT in plain torch from canonical (Megatron-packed) tensors, one loop a head; shares no code with the package."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_minitron.arch.spec import ModelSpec


def logits(get: Callable[[str], Tensor], spec: ModelSpec, tokens: Tensor) -> Tensor:
    """Float64 logits `[s, V]` of one sequence `[s]`; Llama-like models (RMSNorm, SwiGLU, rotary halves)."""
    weight = {}

    def w(name: str) -> Tensor:
        if name not in weight:
            weight[name] = get(name).double()
        return weight[name]

    x = w("embedding.word_embeddings.weight")[tokens]
    for index, layer in enumerate(spec.layers):
        prefix = f"decoder.layers.{index}."
        attention, mlp = prefix + "self_attention.", prefix + "mlp."
        h = _rms(x, w(attention + "linear_qkv.layer_norm_weight"), spec.norm_eps)
        qkv = h @ w(attention + "linear_qkv.weight").T
        if spec.qkv_bias:
            qkv = qkv + w(attention + "linear_qkv.bias")
        x = x + _attention(qkv, spec, layer) @ w(attention + "linear_proj.weight").T
        h = _rms(x, w(mlp + "linear_fc1.layer_norm_weight"), spec.norm_eps)
        both = h @ w(mlp + "linear_fc1.weight").T
        gate, up = both[:, : layer.mlp.ffn_hidden_size], both[:, layer.mlp.ffn_hidden_size :]
        x = x + (gate * torch.sigmoid(gate) * up) @ w(mlp + "linear_fc2.weight").T
    x = _rms(x, w("decoder.final_layernorm.weight"), spec.norm_eps)
    head = "embedding.word_embeddings.weight" if spec.tied_embeddings else "output_layer.weight"
    return x @ w(head).T


def _attention(qkv: Tensor, spec: ModelSpec, layer: object) -> Tensor:
    """Rows of `qkv` are groups of [q ... q, k, v]; the output is the heads side by side in global order."""
    per_group = layer.attention.num_attention_heads // layer.attention.num_query_groups
    size = spec.head_dim
    length = qkv.shape[0]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    outputs = []
    for group in range(layer.attention.num_query_groups):
        first = group * (per_group + 2) * size
        slots = [qkv[:, first + slot * size : first + (slot + 1) * size] for slot in range(per_group + 2)]
        key, value = _rotate(slots[-2], spec), slots[-1]
        for query in slots[:per_group]:
            scores = _rotate(query, spec) @ key.T / math.sqrt(size)
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value)
    return torch.cat(outputs, dim=-1)


def _rotate(x: Tensor, spec: ModelSpec) -> Tensor:
    half = spec.head_dim // 2
    frequency = spec.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * frequency
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def _rms(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale
