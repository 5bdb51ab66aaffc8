"""Nemotron-3, Nemotron-4 and Minitron: squared ReLU, zero-centred LayerNorm, heads rotated in part."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.families.common import read_common, write_common
from nemo_minitron.arch.spec import Activation, ModelSpec, Norm
from nemo_minitron.arch.weights import LAYER_PREFIX

_ROTARY_PERCENT = 0.5  # what NemotronConfig assumes
_HF_LAYER = "model.layers.{i}."

_NAMES = LLAMA_LIKE_NAMES | {
    LAYER_PREFIX + "self_attention.linear_qkv.layer_norm_bias": (_HF_LAYER + "input_layernorm.bias",),
    LAYER_PREFIX + "mlp.linear_fc1.layer_norm_bias": (_HF_LAYER + "post_attention_layernorm.bias",),
    LAYER_PREFIX + "mlp.linear_fc1.weight": (_HF_LAYER + "mlp.up_proj.weight",),
    "decoder.final_layernorm.bias": ("model.norm.bias",),
}

# What NemotronConfig assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 6144,
    "intermediate_size": 24_576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": None,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    return read_common(
        config,
        family="nemotron",
        activation_name="relu2",
        eps_key="norm_eps",
        rotary_percent=_ROTARY_PERCENT,
        activation=Activation.SQUARED_RELU,
        norm=Norm.LAYERNORM1P,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    config = write_common(
        spec, model_type="nemotron", architecture="NemotronForCausalLM", activation="relu2", eps_key="norm_eps"
    )
    config["rope_parameters"]["partial_rotary_factor"] = spec.rotary_percent
    return config | {"partial_rotary_factor": spec.rotary_percent, "attention_bias": False, "mlp_bias": False}


NEMOTRON = Family(
    name="nemotron",
    hf_model_type="nemotron",
    hf_architecture="NemotronForCausalLM",
    hf_names=_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    fixed={"activation": Activation.SQUARED_RELU, "norm": Norm.LAYERNORM1P},
    free=("tied_embeddings", "rotary_percent"),
)
