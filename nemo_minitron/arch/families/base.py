"""What a family has to say, as data and two pure functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX

_HF_LAYER = "model.layers.{i}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model family.

    Attributes:
        name: Key in `FAMILIES`.
        hf_model_type: `model_type` in `config.json`.
        hf_architecture: Class name in `architectures`.
        hf_names: Canonical row name to the Hugging Face names of its parts, in packing order (q, k, v or gate, up).
        read_config: `config.json` data to a spec.
        write_config: A spec to `config.json` data (architecture keys only).
    """

    name: str
    hf_model_type: str
    hf_architecture: str
    hf_names: Mapping[str, tuple[str, ...]]
    read_config: Callable[[Mapping[str, Any]], ModelSpec]
    write_config: Callable[[ModelSpec], dict[str, Any]]


# Names shared by every family that copies Llama's modelling code.
LLAMA_LIKE_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    LAYER_PREFIX + "self_attention.linear_qkv.layer_norm_weight": (_HF_LAYER + "input_layernorm.weight",),
    LAYER_PREFIX + "self_attention.linear_qkv.weight": tuple(
        _HF_LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"
    ),
    LAYER_PREFIX + "self_attention.linear_qkv.bias": tuple(_HF_LAYER + f"self_attn.{part}_proj.bias" for part in "qkv"),
    LAYER_PREFIX + "self_attention.linear_proj.weight": (_HF_LAYER + "self_attn.o_proj.weight",),
    LAYER_PREFIX + "mlp.linear_fc1.layer_norm_weight": (_HF_LAYER + "post_attention_layernorm.weight",),
    LAYER_PREFIX + "mlp.linear_fc1.weight": (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
    LAYER_PREFIX + "mlp.linear_fc2.weight": (_HF_LAYER + "mlp.down_proj.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
