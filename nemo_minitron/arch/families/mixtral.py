"""Mixtral: Mistral's shape with experts in every layer, whose weights are those of the chosen ones, normalised."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import EXPERT_NAMES, LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.families.common import read_common, shared_part, window_of, write_common
from nemo_minitron.arch.families.mistral import with_window
from nemo_minitron.arch.layer import Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX

_HF_BLOCK = "model.layers.{i}.block_sparse_moe."
_EXPERT = LAYER_PREFIX + "mlp.experts.local_experts.{e}."
_NAMES = (
    LLAMA_LIKE_NAMES
    | EXPERT_NAMES
    | {
        LAYER_PREFIX + "mlp.router.weight": (_HF_BLOCK + "gate.weight",),
        _EXPERT + "linear_fc1.weight": (_HF_BLOCK + "experts.{e}.w1.weight", _HF_BLOCK + "experts.{e}.w3.weight"),
        _EXPERT + "linear_fc2.weight": (_HF_BLOCK + "experts.{e}.w2.weight",),
    }
)

_ROTARY_BASE = 1_000_000.0

# What MixtralConfig assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    experts = Moe(
        num_experts=config["num_local_experts"],
        expert_ffn_hidden_size=config["intermediate_size"],
        top_k=config["num_experts_per_tok"],
    )
    spec = read_common(config, family="mixtral", feed_forward=lambda _: experts, rotary_base_assumed=_ROTARY_BASE)
    return with_window(spec, window_of(config))


def _write(spec: ModelSpec) -> dict[str, Any]:
    experts = shared_part(spec, Moe)
    return write_common(spec, model_type="mixtral", architecture="MixtralForCausalLM") | {
        "intermediate_size": experts.expert_ffn_hidden_size,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "sliding_window": spec.sliding_window,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
    }


MIXTRAL = Family(
    name="mixtral",
    hf_model_type="mixtral",
    hf_architecture="MixtralForCausalLM",
    hf_names=_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=("sliding_window", "num_local_experts"),
    free=("tied_embeddings", "rope_scaling", "sliding_window"),
    experts={},
)
