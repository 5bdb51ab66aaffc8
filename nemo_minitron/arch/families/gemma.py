"""Gemma 1, and the texts of Gemma 3: zero-centred RMSNorm, GELU by tanh, embeddings scaled by `sqrt(hidden_size)`.

Gemma 2 is refused: it caps its final logits, which the losses fused with the output layer do not.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, QK_NORM_NAMES, Family
from nemo_minitron.arch.families.common import read_common, refuse_indivisible, rope_base, rope_scaling, write_common
from nemo_minitron.arch.spec import Activation, ModelSpec, Norm
from nemo_minitron.arch.weights import LAYER_PREFIX
from nemo_minitron.errors import SpecError

_HEAD_DIM = 256  # what both classes assume
_TANH = "gelu_pytorch_tanh"
_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0
_WINDOW = 4096
_PATTERN = 6  # every sixth layer of Gemma 3 is global, unless its config says otherwise
_HF_LAYER = "model.layers.{i}."
_TRAITS: dict[str, Any] = {
    "activation": Activation.GEGLU_TANH,
    "norm": Norm.RMSNORM1P,
    "scaled_embeddings": True,
}
_TRAITS_3: dict[str, Any] = _TRAITS | {"qk_norm": True, "post_norms": True}

_NAMES_3 = (
    LLAMA_LIKE_NAMES
    | QK_NORM_NAMES
    | {
        LAYER_PREFIX + "self_attention.linear_proj.post_layernorm.weight": (
            _HF_LAYER + "post_attention_layernorm.weight",
        ),
        LAYER_PREFIX + "mlp.linear_fc1.layer_norm_weight": (_HF_LAYER + "pre_feedforward_layernorm.weight",),
        LAYER_PREFIX + "mlp.linear_fc2.post_layernorm.weight": (_HF_LAYER + "post_feedforward_layernorm.weight",),
    }
)


def _read(config: Mapping[str, Any]) -> ModelSpec:
    # transformers takes "gelu" of the first releases for what was meant.
    meant = {**config, "hidden_act": _TANH} if config.get("hidden_act") == "gelu" else config
    if config.get("hidden_activation", _TANH) not in (None, _TANH):
        raise SpecError(
            f"config.json: hidden_activation = {config['hidden_activation']!r} is not supported", rule=_TANH
        )
    return read_common(
        meant, family="gemma", activation_name=_TANH, default_head_dim=_HEAD_DIM, default_tied=True, **_TRAITS
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    extra = {"attention_bias": False, "hidden_activation": _TANH}
    return write_common(spec, model_type="gemma", architecture="GemmaForCausalLM", activation=_TANH) | extra


def _read_3(config: Mapping[str, Any]) -> ModelSpec:
    rope = config.get("rope_parameters") or {}
    far = rope.get("full_attention") or config.get("rope_scaling") or {}
    near = rope.get("sliding_attention") or {}
    if rope_scaling(near) or rope_scaling(far):
        raise SpecError("config.json: rotary scaling is not supported for gemma3")
    spec = read_common(
        config,
        family="gemma3",
        activation_name=_TANH,
        activation_key="hidden_activation",
        default_head_dim=_HEAD_DIM,
        default_tied=True,
        rotary_base=rope_base(far, config.get("rope_theta") or _GLOBAL_BASE),
        local_rotary_base=rope_base(near, config.get("rope_local_base_freq") or _LOCAL_BASE),
        **_TRAITS_3,
    )
    scalar = float(config.get("query_pre_attn_scalar") or _HEAD_DIM)
    layers = tuple(
        replace(layer, local=local) for layer, local in zip(spec.layers, _locals(config, spec.num_layers), strict=True)
    )
    query_scalar = None if scalar == spec.head_dim else scalar
    return replace(spec, layers=layers, sliding_window=config.get("sliding_window", _WINDOW), query_scalar=query_scalar)


def _locals(config: Mapping[str, Any], count: int) -> list[bool]:
    """Which layers have the window."""
    kinds = config.get("layer_types")
    if kinds is None:
        pattern = config.get("sliding_window_pattern") or _PATTERN
        return [bool((index + 1) % pattern) for index in range(count)]
    if len(kinds) != count or set(kinds) - {"sliding_attention", "full_attention"}:
        raise SpecError(
            f"config.json: layer_types = {kinds} is not supported",
            rule=f"sliding_attention or full_attention for each of {count} layers",
        )
    return [kind == "sliding_attention" for kind in kinds]


def _write_3(spec: ModelSpec) -> dict[str, Any]:
    refuse_indivisible(spec, "Gemma3TextConfig")
    config = write_common(spec, model_type="gemma3_text", architecture="Gemma3ForCausalLM")
    del config["hidden_act"]
    local_base = spec.local_rotary_base or spec.rotary_base
    return config | {
        "hidden_activation": _TANH,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": _whole(spec.query_scalar or spec.head_dim),
        "sliding_window": spec.sliding_window,
        "layer_types": ["sliding_attention" if layer.local else "full_attention" for layer in spec.layers],
        "rope_local_base_freq": local_base,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": spec.rotary_base},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
    }


def _whole(scalar: float) -> int:
    """As the class wants it."""
    if scalar != int(scalar):
        raise SpecError(f"query_scalar = {scalar} is no whole number", rule="Gemma3TextConfig holds a whole number")
    return int(scalar)


GEMMA = Family(
    name="gemma",
    hf_model_type="gemma",
    hf_architecture="GemmaForCausalLM",
    hf_names=LLAMA_LIKE_NAMES,
    read=_read,
    write=_write,
    fixed=_TRAITS,
)

GEMMA3 = Family(
    name="gemma3",
    hf_model_type="gemma3_text",
    hf_architecture="Gemma3ForCausalLM",
    hf_names=_NAMES_3,
    read=_read_3,
    write=_write_3,
    settings=("sliding_window", "layer_types", "query_pre_attn_scalar"),
    fixed=_TRAITS_3,
    free=("tied_embeddings", "sliding_window", "local_rotary_base", "query_scalar"),
)
