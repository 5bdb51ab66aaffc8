"""Phi-3 and Phi-4-mini without long-context scaling: Llama's shape, stored as two fused projections."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.families.common import read_common, window_of, write_common
from nemo_minitron.arch.families.mistral import with_window
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX

_HF_LAYER = "model.layers.{i}."

# All query rows, all key rows, all value rows; all gate rows, all up rows.
_NAMES = LLAMA_LIKE_NAMES | {
    LAYER_PREFIX + "self_attention.linear_qkv.weight": (_HF_LAYER + "self_attn.qkv_proj.weight",),
    LAYER_PREFIX + "mlp.linear_fc1.weight": (_HF_LAYER + "mlp.gate_up_proj.weight",),
}

# What Phi3Config assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 32_000,
    "pad_token_id": 32_000,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    return with_window(read_common(config, family="phi3"), window_of(config))


def _write(spec: ModelSpec) -> dict[str, Any]:
    config = write_common(spec, model_type="phi3", architecture="Phi3ForCausalLM")
    config["rope_parameters"]["partial_rotary_factor"] = spec.rotary_percent
    return config | {
        "partial_rotary_factor": spec.rotary_percent,
        "original_max_position_embeddings": spec.max_position_embeddings,
        "sliding_window": spec.sliding_window,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


PHI3 = Family(
    name="phi3",
    hf_model_type="phi3",
    hf_architecture="Phi3ForCausalLM",
    hf_names=_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=("sliding_window",),
    free=("tied_embeddings", "rotary_percent", "sliding_window"),
)
