"""Qwen2-MoE and Qwen1.5-MoE: Qwen2's attention, experts, and beside them one that sees every token through a gate."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import (
    EXPERT_NAMES,
    LLAMA_LIKE_NAMES,
    QKV_BIAS_NAMES,
    Family,
    shared_expert_names,
)
from nemo_minitron.arch.families.common import read_common, shared_part, write_common
from nemo_minitron.arch.families.sparse_layers import (
    SPARSE_DEFAULTS,
    number_of_experts,
    qwen_feed_forwards,
    write_sparse_layers,
)
from nemo_minitron.arch.layer import Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX

_NAMES = (
    LLAMA_LIKE_NAMES
    | QKV_BIAS_NAMES
    | EXPERT_NAMES
    | shared_expert_names("shared_expert")
    | {LAYER_PREFIX + "mlp.shared_experts.gate_weight": ("model.layers.{i}.mlp.shared_expert_gate.weight",)}
)

# What Qwen2MoeConfig assumes.
_DEFAULTS: dict[str, Any] = SPARSE_DEFAULTS | {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "qkv_bias": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    experts = Moe(
        num_experts=number_of_experts(config, 60),
        expert_ffn_hidden_size=config["moe_intermediate_size"],
        top_k=config["num_experts_per_tok"],
        shared_ffn_hidden_size=config["shared_expert_intermediate_size"],
        shared_gate=True,
        normalize_top_k=config["norm_topk_prob"],
    )
    feed_forward = qwen_feed_forwards(config, experts)
    return read_common(config, family="qwen2_moe", feed_forward=feed_forward, qkv_bias=config["qkv_bias"])


def _write(spec: ModelSpec) -> dict[str, Any]:
    config = write_common(spec, model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM")
    experts = shared_part(spec, Moe)
    shared = {"shared_expert_intermediate_size": experts.shared_ffn_hidden_size, "qkv_bias": spec.qkv_bias}
    return config | write_sparse_layers(spec) | shared


QWEN2_MOE = Family(
    name="qwen2_moe",
    hf_model_type="qwen2_moe",
    hf_architecture="Qwen2MoeForCausalLM",
    hf_names=_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=("sliding_window", "num_experts", "num_local_experts", "qkv_bias"),
    free=("tied_embeddings", "rope_scaling", "qkv_bias"),
    experts={"shared_gate": True},
    free_experts=("normalize_top_k", "shared_ffn_hidden_size"),
    has_dense_layers=True,
)
