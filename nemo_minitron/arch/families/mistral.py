"""Mistral and Mistral-NeMo: Llama's shape, any number of heads for any hidden size, a sliding window or none."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.families.common import read_common, window_of, write_common
from nemo_minitron.arch.spec import ModelSpec

# What MistralConfig assumes.
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
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def with_window(spec: ModelSpec, window: int | None) -> ModelSpec:
    """The same model with every layer local."""
    if window is None:
        return spec
    layers = tuple(layer.looking_back(local=True) for layer in spec.layers)
    return replace(spec, sliding_window=window, layers=layers)


def _read(config: Mapping[str, Any]) -> ModelSpec:
    return with_window(read_common(config, family="mistral"), window_of(config))


def write_mistral(spec: ModelSpec) -> dict[str, Any]:
    """`config.json` data for the Mistral class."""
    config = write_common(spec, model_type="mistral", architecture="MistralForCausalLM")
    return config | {"sliding_window": spec.sliding_window}


MISTRAL = Family(
    name="mistral",
    hf_model_type="mistral",
    hf_architecture="MistralForCausalLM",
    hf_names=LLAMA_LIKE_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=write_mistral,
    settings=("sliding_window",),
    free=("tied_embeddings", "rope_scaling", "sliding_window"),
)
