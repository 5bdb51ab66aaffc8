"""Toys of every family with experts: 3 layers, hidden 48, 4 heads in 2 groups, 6 experts of 24 neurons."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Dots1Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests import tiny

LAYERS, HIDDEN, HEADS, GROUPS, SIZE, EXPERTS, FFN, DENSE = 3, 48, 4, 2, 16, 6, 24, 40

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": EXPERTS, "intermediate_size": FFN}),
    "mixtral, window": (MixtralConfig, {"num_local_experts": EXPERTS, "intermediate_size": FFN, "sliding_window": 5}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": EXPERTS, "moe_intermediate_size": FFN, "norm_topk_prob": True}),
    "qwen3_moe, some dense": (
        Qwen3MoeConfig,
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": FFN,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": FFN, "shared_expert_intermediate_size": 32},
    ),
    # Its class wants a hidden size of heads times their channels.
    "olmoe": (
        OlmoeConfig,
        {"num_experts": EXPERTS, "intermediate_size": FFN, "head_dim": HIDDEN // HEADS, "num_experts_per_tok": 3},
    ),
    "dots1": (
        Dots1Config,
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": FFN,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "sliding_window": None,
        },
    ),
}


def write_experts(
    path: Path,
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trained_steps: int = 0,
    **changes: Any,
) -> None:
    """A model out of `CONFIGS` and a tokenizer, as transformers saves them.

    Random, or trained for some steps as in `tiny.write_llama`.
    """
    model = build_experts(name, seed=seed, **changes).to(dtype)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):  # fp32 in a model of any dtype
            buffer.data = buffer.float()
    tokenizer = tiny.write_tokenizer(path, vocab_size=256)
    if trained_steps:
        tiny.train(model, tokenizer, trained_steps)
    model.save_pretrained(path)


def build_experts(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model alone. Weights are large, so that experts, heads and neurons really differ."""
    kind, extra = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**_COMMON | extra | changes)).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.15 if parameter.ndim > 1 else 0.3)
            if "norm" in key:
                parameter.add_(1.0)
            if key.endswith(".gate.weight"):
                parameter.mul_(4.0)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model.eval()


def loaded(folder: Path) -> PreTrainedModel:
    """What transformers reads from a folder, in fp32. Eager, since that is what the other implementations are after."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()


def router_of(layer: nn.Module) -> nn.Module:
    """The router of a layer of transformers that has experts."""
    return layer.mlp.gate
