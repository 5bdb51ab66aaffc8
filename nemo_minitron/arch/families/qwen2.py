"""Qwen2 and Qwen2.5: Llama's shape with a bias on the fused QKV projection."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, QKV_BIAS_NAMES, Family
from nemo_minitron.arch.families.common import read_common, write_common
from nemo_minitron.arch.spec import ModelSpec


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
    write=_write,
    # `sliding_window` alone does nothing: use_sliding_window decides, and is refused.
    settings=("sliding_window",),
    fixed={"qkv_bias": True},
    free=("tied_embeddings", "rope_scaling"),
)
