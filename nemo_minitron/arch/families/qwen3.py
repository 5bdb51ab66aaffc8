"""Qwen3 (dense): Llama's shape with an RMSNorm on each query and key head."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, QK_NORM_NAMES, Family
from nemo_minitron.arch.families.common import read_common, write_common
from nemo_minitron.arch.spec import ModelSpec

# What Qwen3Config assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    return read_common(config, family="qwen3", qk_norm=True)


def _write(spec: ModelSpec) -> dict[str, Any]:
    extra = {"attention_bias": False, "use_sliding_window": False}
    return write_common(spec, model_type="qwen3", architecture="Qwen3ForCausalLM") | extra


QWEN3 = Family(
    name="qwen3",
    hf_model_type="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    hf_names=LLAMA_LIKE_NAMES | QK_NORM_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=("sliding_window",),
    fixed={"qk_norm": True},
    free=("tied_embeddings", "rope_scaling"),
)
