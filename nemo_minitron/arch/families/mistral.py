"""Mistral and Mistral-NeMo: Llama's shape, any number of heads for any hidden size, full attention."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.families.llama import read_llama_like, write_mistral
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError


def _read(config: Mapping[str, Any]) -> ModelSpec:
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        raise SpecError(f"config.json: sliding_window = {window} is not supported for Mistral", rule="null")
    return read_llama_like(config, family="mistral", qkv_bias=False)


MISTRAL = Family(
    name="mistral",
    hf_model_type="mistral",
    hf_architecture="MistralForCausalLM",
    hf_names=LLAMA_LIKE_NAMES,
    read_config=_read,
    write_config=write_mistral,
)
