"""Qwen3-MoE: Qwen3's attention, and experts in place of MLPs in all layers or in some."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import EXPERT_NAMES, LLAMA_LIKE_NAMES, QK_NORM_NAMES, Family
from nemo_minitron.arch.families.common import read_common, write_common
from nemo_minitron.arch.families.sparse_layers import (
    SPARSE_DEFAULTS,
    number_of_experts,
    qwen_feed_forwards,
    write_sparse_layers,
)
from nemo_minitron.arch.layer import Moe
from nemo_minitron.arch.spec import ModelSpec

# What Qwen3MoeConfig assumes.
_DEFAULTS: dict[str, Any] = SPARSE_DEFAULTS | {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "moe_intermediate_size": 768,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    experts = Moe(
        num_experts=number_of_experts(config, 128),
        expert_ffn_hidden_size=config["moe_intermediate_size"],
        top_k=config["num_experts_per_tok"],
        normalize_top_k=config["norm_topk_prob"],
    )
    return read_common(config, family="qwen3_moe", feed_forward=qwen_feed_forwards(config, experts), qk_norm=True)


def _write(spec: ModelSpec) -> dict[str, Any]:
    config = write_common(spec, model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM")
    return config | write_sparse_layers(spec) | {"attention_bias": False}


QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_model_type="qwen3_moe",
    hf_architecture="Qwen3MoeForCausalLM",
    hf_names=LLAMA_LIKE_NAMES | QK_NORM_NAMES | EXPERT_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=("sliding_window", "num_experts", "num_local_experts"),
    fixed={"qk_norm": True},
    free=("tied_embeddings", "rope_scaling"),
    experts={},
    free_experts=("normalize_top_k",),
    has_dense_layers=True,
)
