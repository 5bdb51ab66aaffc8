"""An architecture in the words of NeMo 2, Megatron-Bridge and Megatron-LM, and back. Plain data, no Megatron.

NeMo 2 and Bridge store the fields of Megatron-Core's `TransformerConfig` and a few beside; Megatron-LM stores its
command line. Both are translated to and from the spec.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_minitron.arch.expert_fields import expert_fields, feed_forwards
from nemo_minitron.arch.hybrid_fields import hybrid_spec, is_hybrid, rope_of_hybrid
from nemo_minitron.arch.settings import (
    has_plain_layers,
    settings_in,
    shared_size,
    spec_from_settings,
    vocab_divisor,
    vocabulary,
    window_of,
)
from nemo_minitron.arch.spec import Activation, LinearScaling, ModelSpec, Norm, RopeScaling, YarnScaling
from nemo_minitron.errors import SpecError

# Fields of TransformerConfig, and of the model class beside it, by the names of `arch.settings`.
_FIELDS: dict[str, str] = {
    **{name: name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
    "num_query_groups": "num_query_groups",
    "head_dim": "kv_channels",
    "norm_eps": "layernorm_epsilon",
    "qk_norm": "qk_layernorm",
    "position_embedding": "position_embedding_type",
    "rotary_base": "rotary_base",
    "linear_factor": "seq_len_interpolation_factor",
    "tied_embeddings": "share_embeddings_and_output_weights",
    "window": "window_size",
    "zero_centred_norm": "layernorm_zero_centered_gamma",
    "vocab_divisor": "make_vocab_size_divisible_by",
    "rotary_interleaved": "rotary_interleaved",
    "linear_bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias",
    "rotary_percent": "rotary_percent",
    "max_position_embeddings": "seq_length",
}
# Arguments of Megatron-LM, likewise.
_ARGS: dict[str, str] = {
    **{name: name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
    "head_dim": "kv_channels",
    "qk_norm": "qk_layernorm",
    "max_position_embeddings": "max_position_embeddings",
    "position_embedding": "position_embedding_type",
    "rotary_base": "rotary_base",
    "window": "window_size",
    "vocab_divisor": "make_vocab_size_divisible_by",
    "rotary_interleaved": "rotary_interleaved",
    "norm_eps": "norm_epsilon",
    "linear_bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias",
    "rotary_percent": "rotary_percent",
    "linear_factor": "rotary_seq_len_interpolation_factor",
    "zero_centred_norm": "apply_layernorm_1p",
}
_GROUPS = "num_query_groups"  # an argument that counts only beside another
_FUNCTIONS = {
    Activation.SWIGLU: "torch.nn.functional.silu",
    Activation.GEGLU: "torch.nn.functional.gelu",
    Activation.GEGLU_TANH: "nemo.collections.llm.fn.activation.openai_gelu",
    Activation.GELU: "torch.nn.functional.gelu",
    Activation.SQUARED_RELU: "nemo.collections.llm.fn.activation.squared_relu",
}
# Last part of a function's name, gated or not.
_FUNCTIONS_READ = {
    ("silu", True): Activation.SWIGLU,
    ("gelu", True): Activation.GEGLU,
    ("openai_gelu", True): Activation.GEGLU_TANH,
    ("fast_gelu", True): Activation.GEGLU_TANH,
    ("gelu", False): Activation.GELU,
    ("squared_relu", False): Activation.SQUARED_RELU,
}
# Settings that change what a model computes and have no counterpart in NeMo-1's keys, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("multi_latent_attention", "parallel_attention", "no_rope_freq", "softcap"), ()),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"), ()),
    **dict.fromkeys(("heterogeneous_layers_config_path", "window_attn_skip_freq", "interleaved_attn_pattern"), ()),
    **dict.fromkeys(("hybrid_layer_pattern", "experimental_attention_variant", "heterogeneous_block_specs"), ()),
    **dict.fromkeys(("heterogeneous_layers_config_encoded_json", "qk_l2_norm", "activation_func_clamp_value"), ()),
    **dict.fromkeys(("softmax_type",), ("vanilla",)),
    **dict.fromkeys(("attention_output_gate", "linear_attention_freq", "mtp_num_layers", "glu_linear_offset"), ()),
}
_CHANGED_BY_TRAINING = (
    *("seq_length", "encoder_seq_length", "make_vocab_size_divisible_by", "padded_vocab_size", "iteration"),
    *("hidden_dropout", "attention_dropout", "apply_rope_fusion", "bf16", "fp16"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_bias_update_rate"),
    "moe_token_dispatcher_type",
)
"""What may differ from the architecture a checkpoint was first written with."""
_WRITTEN = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("normalization", "layernorm_epsilon", "activation_func", "gated_linear_unit", "add_bias_linear", "add_qkv_bias"),
    *("qk_layernorm", "position_embedding_type", "rotary_base", "rotary_percent"),
    "share_embeddings_and_output_weights",
)
"""Fields without which a model cannot be told: classes of NeMo 2 and Bridge have defaults of their own."""
_ONE_GROUP = 1
"""Megatron-LM's default of --num-query-groups, which only --group-query-attention heeds."""
_SCALE_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}


def transformer_fields(spec: ModelSpec) -> dict[str, Any]:
    """Fields of `TransformerConfig` and of the model around it, `activation_func` by name. See `is_representable`."""
    settings = _settings(spec)
    fields = {field: settings[name] for name, field in _FIELDS.items() if name in settings}
    fields |= {
        "normalization": _norm_kind(spec),
        "layernorm_zero_centered_gamma": spec.norm.zero_centred,
        "activation_func": _FUNCTIONS[spec.activation],
        "gated_linear_unit": spec.activation.gated,
        "vocab_size": spec.vocab_size,
        "window_size": window_of(spec),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_rope_fusion": False,  # NeMo 2's classes switch it on; without Transformer Engine they refuse it
    }
    return fields | expert_fields(spec)


def _settings(spec: ModelSpec) -> dict[str, Any]:
    """The settings of `arch.settings` that hold for every model, and the window where there is one."""
    linear = spec.rope_scaling.factor if isinstance(spec.rope_scaling, LinearScaling) else None
    window = window_of(spec)
    sizes = ("ffn_hidden_size", "num_attention_heads", "num_query_groups")
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        **{name: shared_size(spec, name) for name in sizes},
        "head_dim": spec.head_dim,
        "norm_eps": spec.norm_eps,
        "qk_norm": spec.qk_norm,
        "position_embedding": "rope",
        "rotary_base": spec.rotary_base,
        "linear_factor": linear,
        "tied_embeddings": spec.tied_embeddings,
        **({} if window is None else {"window": window}),
        "zero_centred_norm": spec.norm.zero_centred,
        "vocab_divisor": vocab_divisor(spec.vocab_size),
        "linear_bias": spec.linear_bias,
        "qkv_bias": spec.qkv_bias,
        "rotary_percent": spec.rotary_percent,
        "max_position_embeddings": spec.max_position_embeddings,
    }


def _norm_kind(spec: ModelSpec) -> str:
    return "LayerNorm" if spec.norm.subtracts_mean else "RMSNorm"


def is_representable(spec: ModelSpec) -> bool:
    """Whether those fields, with `rope_fields`, describe all that the model computes."""
    return has_plain_layers(spec, experts=True) and not isinstance(spec.rope_scaling, YarnScaling)


def rope_fields(spec: ModelSpec) -> dict[str, Any]:
    """Llama 3.1's rotary scaling as fields of NeMo 2's `Llama31Config`; {} for a model without."""
    scaling = spec.rope_scaling
    if not isinstance(scaling, RopeScaling):  # linear scaling is seq_len_interpolation_factor
        return {}
    return {
        "scale_factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "old_context_len": scaling.original_max_position_embeddings,
    }


def contradictions(spec: ModelSpec, fields: Mapping[str, Any], *, args: bool) -> Iterator[tuple[str, Any, Any]]:
    """Fields that say something else than an architecture: name, what they say, what they should.

    Args:
        spec: The architecture.
        fields: Of NeMo 2 or Bridge, functions by their dotted names; or arguments of Megatron-LM.
        args: Whether they are arguments.
    """
    expected = megatron_args(spec, dtype="float32") if args else transformer_fields(spec) | rope_fields(spec)
    for name, value in expected.items():
        found = fields.get(name, value)
        if name == "rope_scaling_factor" and not isinstance(spec.rope_scaling, RopeScaling):
            continue
        if name in _CHANGED_BY_TRAINING or (found is None and name in ("num_query_groups", "kv_channels")):
            continue
        if name == "activation_func":
            same = str(found).rpartition(".")[2] == value.rpartition(".")[2]
        else:
            same = (list(found) if isinstance(found, tuple) else found) == value
        if not same:
            yield name, found, value


def spec_from_transformer_fields(fields: Mapping[str, Any], *, vocab_rows: int, where: str) -> ModelSpec:
    """The architecture of a NeMo-2 or Bridge configuration.

    Args:
        fields: Plain data; functions by their dotted names.
        vocab_rows: Rows of the stored embedding.
        where: For messages.

    Raises:
        SpecError: A field is missing or a setting is not supported.
    """
    _refuse(fields, where)
    if missing := [field for field in _WRITTEN if field not in fields]:
        raise SpecError(
            f"{where}: {missing[0]} is missing",
            rule="every field that decides what is computed is written out, since classes have defaults of their own",
            remedy="save the checkpoint again with the version that wrote it, which writes model.yaml beside io.json",
        )
    gated = bool(fields.get("gated_linear_unit", False))
    name = str(fields.get("activation_func") or "gelu").rpartition(".")[2]
    if (name, gated) not in _FUNCTIONS_READ:
        kind = "gated " if gated else ""
        raise SpecError(f"{where}: activation_func = {kind}{name[:60]!r} is not supported")
    found = settings_in(_stated(fields), _FIELDS)
    found["scaled_embeddings"] = "Gemma" in str(fields.get("_target_", ""))
    return _spec_of(
        found,
        fields,
        _FIELDS,
        where=where,
        vocab_size=vocabulary(fields.get("vocab_size"), "vocab_size", vocab_rows, where=where),
        activation=_FUNCTIONS_READ[name, gated],
        norm=_norm(fields, where),
        rope_scaling=_scaling(fields),
    )


def _spec_of(
    found: dict[str, Any], fields: Mapping[str, Any], keys: Mapping[str, str], *, where: str, **traits: Any
) -> ModelSpec:
    """The architecture of settings and, of a model with experts or a hybrid, of the fields that they stand in."""
    if not is_hybrid(fields):
        experts = feed_forwards(_stated(fields), where=where)
        return spec_from_settings(found, keys, where=where, feed_forward=experts, **traits)
    spec = spec_from_settings(rope_of_hybrid(found), keys, where=where, **traits)
    without_positions = found.get("position_embedding") == "none"
    return hybrid_spec(spec, fields, without_positions=without_positions, where=where)


def megatron_args(spec: ModelSpec, *, dtype: str) -> dict[str, Any]:
    """Megatron-LM's arguments of an architecture."""
    settings = _settings(spec)
    args = {arg: settings[name] for name, arg in _ARGS.items() if name in settings}
    attention = {layer.mixer and tuple(layer.mixer.sizes.values()) for layer in spec.layers}
    grouped = len(attention) == 1 and settings[_GROUPS] != settings["num_attention_heads"]
    args |= {
        "encoder_seq_length": spec.max_position_embeddings,
        "seq_length": spec.max_position_embeddings,
        "num_query_groups": settings[_GROUPS],
        "group_query_attention": grouped,
        "normalization": _norm_kind(spec),
        "apply_layernorm_1p": spec.norm.zero_centred,
        "swiglu": spec.activation is Activation.SWIGLU,
        "squared_relu": spec.activation is Activation.SQUARED_RELU,
        "use_rotary_position_embeddings": True,
        "use_rope_scaling": isinstance(spec.rope_scaling, RopeScaling),
        "rope_scaling_factor": spec.rope_scaling.factor if isinstance(spec.rope_scaling, RopeScaling) else 8.0,
        "rotary_seq_len_interpolation_factor": settings["linear_factor"],
        "untie_embeddings_and_output_weights": not spec.tied_embeddings,
        "vocab_size": spec.vocab_size,
        "padded_vocab_size": spec.vocab_size,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "iteration": 1,
    }
    return args | expert_fields(spec, args=True)


def spec_from_args(args: Mapping[str, Any], *, vocab_rows: int, where: str) -> ModelSpec:
    """The architecture of Megatron-LM's arguments.

    Raises:
        SpecError: An argument is missing or a setting is not supported.
    """
    _refuse(args, where)
    found, keys = settings_in(_stated(args), _ARGS), _ARGS | {"num_query_groups": _GROUPS}
    if args.get("group_query_attention"):
        found["num_query_groups"] = args.get(_GROUPS, _ONE_GROUP)
    activation = Activation.SWIGLU if args.get("swiglu") else Activation.GELU
    if activation is Activation.GELU and args.get("squared_relu"):
        activation = Activation.SQUARED_RELU
    if activation is Activation.GELU and args.get("openai_gelu"):
        raise SpecError(f"{where}: openai_gelu is not supported")
    found["tied_embeddings"] = not args.get("untie_embeddings_and_output_weights", False)
    if args.get("use_rotary_position_embeddings"):
        found["position_embedding"] = "rope"
    factor = float(args.get("rope_scaling_factor") or 8.0)
    return _spec_of(
        found,
        args,
        keys,
        where=where,
        vocab_size=vocabulary(args.get("vocab_size"), "vocab_size", vocab_rows, where=where),
        activation=activation,
        norm=_norm({**args, "layernorm_zero_centered_gamma": args.get("apply_layernorm_1p")}, where),
        rope_scaling=RopeScaling(factor=factor) if args.get("use_rope_scaling") else None,
    )


def _stated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are not null, which here is as good as absent."""
    return {name: value for name, value in fields.items() if value is not None}


def _norm(fields: Mapping[str, Any], where: str) -> Norm:
    kind = fields.get("normalization") or "LayerNorm"
    zero_centred = bool(fields.get("layernorm_zero_centered_gamma"))
    if kind == "RMSNorm":
        return Norm.RMSNORM1P if zero_centred else Norm.RMSNORM
    if kind == "LayerNorm":
        return Norm.LAYERNORM1P if zero_centred else Norm.LAYERNORM
    raise SpecError(f"{where}: normalization = {str(kind)[:60]!r} is not supported", rule="RMSNorm or LayerNorm")


def _scaling(fields: Mapping[str, Any]) -> RopeScaling | None:
    """NeMo 2: fields of `Llama31Config`; Bridge: `rope_scaling` and `rope_scaling_factor`."""
    factor = fields.get("scale_factor")
    if factor is None and fields.get("rope_scaling"):
        factor = fields.get("rope_scaling_factor") or 8.0
    if factor is None:
        return None
    values = {name: fields.get(name) or default for name, default in _SCALE_DEFAULTS.items()}
    return RopeScaling(
        factor=float(factor),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_max_position_embeddings=int(values["old_context_len"]),
    )


def _refuse(fields: Mapping[str, Any], where: str) -> None:
    for name, neutral in _NEUTRAL.items():
        if (found := fields.get(name)) and found not in neutral:
            raise SpecError(f"{where}: {name} = {str(found)[:60]!r} is not supported", rule="absent")
    scale, channels = fields.get("softmax_scale"), fields.get("kv_channels")
    usual = math.nan if channels is None else channels**-0.5
    if scale is not None and not (isinstance(scale, int | float) and math.isclose(scale, usual, rel_tol=1e-6)):
        raise SpecError(
            f"{where}: softmax_scale = {str(scale)[:60]!r} is not supported", rule="absent, or 1 / sqrt(kv_channels)"
        )
