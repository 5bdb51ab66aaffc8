"""Gemma 1, and the texts of Gemma 3: zero-centred RMSNorm, GELU by tanh, embeddings scaled by `sqrt(hidden_size)`.

Gemma 2 is refused: it caps its final logits, which the losses fused with the output layer do not.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, QK_NORM_NAMES, Family
from nemo_minitron.arch.families.common import read_common, refuse_indivisible, write_common
from nemo_minitron.arch.families.rope import Rope, parse_rope, scaling_data
from nemo_minitron.arch.spec import Activation, ModelSpec, Norm
from nemo_minitron.arch.weights import LAYER_PREFIX
from nemo_minitron.errors import SpecError

_TANH = "gelu_pytorch_tanh"
_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0
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

# What GemmaConfig assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# What Gemma3TextConfig assumes.
_DEFAULTS_3: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    # transformers takes "gelu" of the first releases for what was meant.
    meant = {**config, "hidden_act": _TANH} if config["hidden_act"] == "gelu" else config
    if config.get("hidden_activation", _TANH) not in (None, _TANH):
        raise SpecError(
            f"config.json: hidden_activation = {config['hidden_activation']!r} is not supported", rule=_TANH
        )
    return read_common(meant, family="gemma", activation_name=_TANH, **_TRAITS)


def _write(spec: ModelSpec) -> dict[str, Any]:
    extra = {"attention_bias": False, "hidden_activation": _TANH}
    return write_common(spec, model_type="gemma", architecture="GemmaForCausalLM", activation=_TANH) | extra


def _read_3(config: Mapping[str, Any]) -> ModelSpec:
    far, near = _ropes(config)
    spec = read_common(
        config,
        family="gemma3",
        activation_name=_TANH,
        activation_key="hidden_activation",
        rotary_base=far.base,
        rope_scaling=far.scaling,
        local_rotary_base=near.base,
        **_TRAITS_3,
    )
    scalar = float(config["query_pre_attn_scalar"])
    if scalar <= 0:
        raise SpecError(f"config.json: query_pre_attn_scalar = {scalar}", rule="a positive number")
    layers = tuple(
        layer.looking_back(local=local)
        for layer, local in zip(spec.layers, _locals(config, spec.num_layers), strict=True)
    )
    query_scalar = None if scalar == spec.head_dim else scalar
    return replace(spec, layers=layers, sliding_window=config["sliding_window"], query_scalar=query_scalar)


def _ropes(config: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """Rotary parameters of layers that see everything, and of local ones."""
    named, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling")
    if strange := sorted(set(named) - {"full_attention", "sliding_attention"}):
        raise SpecError(
            f"config.json: rope_parameters.{strange[0]} is not supported for gemma3",
            rule="one set of parameters for full_attention, one for sliding_attention",
        )
    found = named.get("full_attention") or {}
    far, other = (
        parse_rope(rope, config, where=where, percent=1.0, base=_GLOBAL_BASE)
        for rope, where in ((found, "rope_parameters.full_attention"), (scaling or found, "rope_scaling"))
    )
    if found and far != other:
        raise SpecError(
            f"config.json: rope_scaling = {scaling}, but rope_parameters.full_attention = {found}",
            rule="transformers mixes the two",
            remedy="keep the one that is meant",
        )
    near = parse_rope(
        named.get("sliding_attention") or {},
        {key: value for key, value in config.items() if key != "rope_theta"},
        where="rope_parameters.sliding_attention",
        percent=1.0,
        base_key="rope_local_base_freq",
        base=_LOCAL_BASE,
    )
    if near.scaling or other.percent != 1 or near.percent != 1:
        raise SpecError("config.json: local layers of gemma3 turn without scaling, and all heads turn complete")
    return other, near


def _locals(config: Mapping[str, Any], count: int) -> list[bool]:
    """Which layers have the window."""
    kinds = config.get("layer_types")
    if kinds is None:
        pattern = config.get("sliding_window_pattern", _PATTERN)
        if type(pattern) is not int or pattern < 1:
            raise SpecError(f"config.json: sliding_window_pattern = {pattern!r}", rule="a whole number from 1")
        return [bool((index + 1) % pattern) for index in range(count)]
    if len(kinds) != count or set(kinds) - {"sliding_attention", "full_attention"}:
        raise SpecError(
            f"config.json: layer_types = {kinds} is not supported",
            rule=f"sliding_attention or full_attention for each of num_hidden_layers = {count} layers",
        )
    return [kind == "sliding_attention" for kind in kinds]


def _write_3(spec: ModelSpec) -> dict[str, Any]:
    refuse_indivisible(spec, "Gemma3TextConfig")
    config = write_common(spec, model_type="gemma3_text", architecture="Gemma3ForCausalLM")
    del config["hidden_act"]
    local_base = spec.local_rotary_base or spec.rotary_base
    config.pop("rope_scaling", None)  # stands in rope_parameters.full_attention
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
            "full_attention": {"rope_type": "default", "rope_theta": spec.rotary_base, **(scaling_data(spec) or {})},
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
    defaults=_DEFAULTS,
    write=_write,
    fixed=_TRAITS,
)

GEMMA3 = Family(
    name="gemma3",
    hf_model_type="gemma3_text",
    hf_architecture="Gemma3ForCausalLM",
    hf_names=_NAMES_3,
    read=_read_3,
    defaults=_DEFAULTS_3,
    write=_write_3,
    settings=("sliding_window", "layer_types", "query_pre_attn_scalar"),
    fixed=_TRAITS_3,
    free=("tied_embeddings", "sliding_window", "local_rotary_base", "query_scalar", "rope_scaling"),
)
