"""Llama 2, 3, 3.1, 3.2 and models that use the class, SmolLM2 among them."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.families.common import read_common, write_common
from nemo_minitron.arch.families.mistral import write_mistral
from nemo_minitron.arch.spec import ModelSpec

# What LlamaConfig assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    return read_common(config, family="llama")


def _write(spec: ModelSpec) -> dict[str, Any]:
    if spec.hidden_size % spec.layer.attention.num_attention_heads:
        # transformers refuses such a LlamaConfig, explicit head_dim or not. Its Mistral class computes the same.
        return write_mistral(spec)
    extra = {"attention_bias": False, "mlp_bias": False}
    return write_common(spec, model_type="llama", architecture="LlamaForCausalLM") | extra


LLAMA = Family(
    name="llama",
    hf_model_type="llama",
    hf_architecture="LlamaForCausalLM",
    hf_names=LLAMA_LIKE_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    free=("tied_embeddings", "rope_scaling"),
)
