"""Qwen2 and Qwen2.5: Llama's shape with a bias on the fused QKV projection."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, QKV_BIAS_NAMES, Family
from nemo_minitron.arch.families.common import read_common, write_common
from nemo_minitron.arch.spec import ModelSpec

# What Qwen2Config assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    return read_common(config, family="qwen2", qkv_bias=True)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return write_common(spec, model_type="qwen2", architecture="Qwen2ForCausalLM") | {"use_sliding_window": False}


QWEN2 = Family(
    name="qwen2",
    hf_model_type="qwen2",
    hf_architecture="Qwen2ForCausalLM",
    hf_names=LLAMA_LIKE_NAMES | QKV_BIAS_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    # `sliding_window` alone does nothing: use_sliding_window decides, and is refused.
    settings=("sliding_window",),
    fixed={"qkv_bias": True},
    free=("tied_embeddings", "rope_scaling"),
)
