"""Qwen2 and Qwen2.5: Llama's shape with a bias on the fused QKV projection."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.families.llama import read_llama_like, write_llama_like
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError


def _read(config: Mapping[str, Any]) -> ModelSpec:
    if config.get("use_sliding_window"):
        raise SpecError("config.json: use_sliding_window = true is not supported for Qwen2", rule="false")
    return read_llama_like(config, family="qwen2", qkv_bias=True)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return write_llama_like(spec, model_type="qwen2", architecture="Qwen2ForCausalLM") | {"use_sliding_window": False}


QWEN2 = Family(
    name="qwen2",
    hf_model_type="qwen2",
    hf_architecture="Qwen2ForCausalLM",
    hf_names=LLAMA_LIKE_NAMES,
    read_config=_read,
    write_config=_write,
)
