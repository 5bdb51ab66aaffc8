"""An architecture in the words of NeMo 2, Megatron-Bridge and Megatron-LM, and back. Plain data, no Megatron.

NeMo 2 and Bridge store the fields of Megatron-Core's `TransformerConfig` and a few beside; Megatron-LM stores its
command line. Both are translated to and from NeMo-1's keys, so that `nemo_config.py` alone decides what an architecture
is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.arch import nemo_config as nemo1
from nemo_minitron.arch.nemo_config import nemo_config, spec_from_nemo_config
from nemo_minitron.arch.spec import Activation, AnyScaling, LinearScaling, ModelSpec, RopeScaling, YarnScaling
from nemo_minitron.errors import SpecError

# Field of TransformerConfig, or of the model class beside it, to NeMo-1's key, where at most the name differs.
_SAME: dict[str, str] = {
    **{name: name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
    **{name: name for name in ("num_query_groups", "kv_channels", "layernorm_epsilon", "qk_layernorm")},
    **{name: name for name in ("position_embedding_type", "rotary_base", "seq_len_interpolation_factor")},
    **{name: name for name in ("share_embeddings_and_output_weights", "window_size", "layernorm_zero_centered_gamma")},
    **{name: name for name in ("make_vocab_size_divisible_by", "num_moe_experts", "rotary_interleaved")},
    "add_bias_linear": "bias",
    "add_qkv_bias": "qkv_bias",
    "rotary_percent": "rotary_percentage",
    "seq_length": "max_position_embeddings",
}
_ARGS: dict[str, str] = {
    **{name: name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")},
    **{name: name for name in ("qk_layernorm", "max_position_embeddings", "position_embedding_type", "rotary_base")},
    **{name: name for name in ("window_size", "make_vocab_size_divisible_by", "rotary_interleaved")},
    "norm_epsilon": "layernorm_epsilon",
    "add_bias_linear": "bias",
    "add_qkv_bias": "qkv_bias",
    "rotary_percent": "rotary_percentage",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "num_experts": "num_moe_experts",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}
_FUNCTIONS = {
    Activation.SWIGLU: "torch.nn.functional.silu",
    Activation.GEGLU: "torch.nn.functional.gelu",
    Activation.GEGLU_TANH: "nemo.collections.llm.fn.activation.openai_gelu",
    Activation.GELU: "torch.nn.functional.gelu",
    Activation.SQUARED_RELU: "nemo.collections.llm.fn.activation.squared_relu",
}
# Last part of a function's name, gated or not, to NeMo-1's `activation` and `openai_gelu`.
_FUNCTIONS_READ = {
    ("silu", True): ("fast-swiglu", False),
    ("gelu", True): ("fast-geglu", False),
    ("openai_gelu", True): ("fast-geglu", True),
    ("fast_gelu", True): ("fast-geglu", True),
    ("gelu", False): ("gelu", False),
    ("squared_relu", False): ("squared-relu", False),
}
# Settings that change what a model computes and have no counterpart in NeMo-1's keys, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("multi_latent_attention", "parallel_attention", "no_rope_freq", "softcap", "is_hybrid_model"), ()),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"), ()),
    **dict.fromkeys(("heterogeneous_layers_config_path", "window_attn_skip_freq", "interleaved_attn_pattern"), ()),
    **dict.fromkeys(("softmax_type",), ("vanilla",)),
    **dict.fromkeys(("attention_output_gate", "linear_attention_freq", "mtp_num_layers", "glu_linear_offset"), ()),
}
_CHANGED_BY_TRAINING = (
    *("seq_length", "encoder_seq_length", "make_vocab_size_divisible_by", "padded_vocab_size", "iteration"),
    *("hidden_dropout", "attention_dropout", "apply_rope_fusion", "bf16", "fp16"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
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
    """Fields of `TransformerConfig` and of the model around it, `activation_func` by name. See `says_all`."""
    keys = nemo_config(spec)
    fields = {field: keys[key] for field, key in _SAME.items() if key in keys}
    fields |= {
        "normalization": _NORMS[keys["normalization"]],
        "layernorm_zero_centered_gamma": spec.norm.zero_centred,
        "activation_func": _FUNCTIONS[spec.activation],
        "gated_linear_unit": spec.activation.gated,
        "vocab_size": spec.vocab_size,
        "window_size": keys.get("window_size"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_rope_fusion": False,  # NeMo 2's classes switch it on; without Transformer Engine they refuse it
    }
    return fields


def says_all(spec: ModelSpec) -> bool:
    """Whether those fields, with `rope_fields`, describe all that the model computes."""
    return nemo1.says_all(replace(spec, rope_scaling=None)) and not isinstance(spec.rope_scaling, YarnScaling)


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
    activation, openai = _FUNCTIONS_READ[name, gated]
    keys = {key: fields[field] for field, key in _SAME.items() if fields.get(field) is not None}
    keys |= {"activation": activation, "openai_gelu": openai, "normalization": _norm(fields, where)}
    keys["apply_embedding_scaling"] = "Gemma" in str(fields.get("_target_", ""))
    keys.setdefault("position_embedding_type", "learned_absolute")
    keys.setdefault("share_embeddings_and_output_weights", True)
    spec = _spec(keys, _vocabulary(fields, vocab_rows, where), where)
    return replace(spec, rope_scaling=_one_scaling(spec, _scaling(fields), where))


def megatron_args(spec: ModelSpec, *, dtype: str) -> dict[str, Any]:
    """Megatron-LM's arguments of an architecture."""
    keys = nemo_config(spec)
    args = {arg: keys[key] for arg, key in _ARGS.items() if key in keys}
    grouped = len({(layer.num_attention_heads, layer.num_query_groups) for layer in spec.layers}) == 1
    args |= {
        "encoder_seq_length": spec.max_position_embeddings,
        "seq_length": spec.max_position_embeddings,
        "num_query_groups": keys["num_query_groups"],
        "group_query_attention": grouped and keys["num_query_groups"] != keys["num_attention_heads"],
        "normalization": _NORMS[keys["normalization"]],
        "apply_layernorm_1p": spec.norm.zero_centred,
        "swiglu": spec.activation is Activation.SWIGLU,
        "squared_relu": spec.activation is Activation.SQUARED_RELU,
        "use_rotary_position_embeddings": True,
        "use_rope_scaling": isinstance(spec.rope_scaling, RopeScaling),
        "rope_scaling_factor": spec.rope_scaling.factor if isinstance(spec.rope_scaling, RopeScaling) else 8.0,
        "rotary_seq_len_interpolation_factor": keys["seq_len_interpolation_factor"],
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
    return args


def spec_from_args(args: Mapping[str, Any], *, vocab_rows: int, where: str) -> ModelSpec:
    """The architecture of Megatron-LM's arguments.

    Raises:
        SpecError: An argument is missing or a setting is not supported.
    """
    _refuse(args, where)
    keys = {key: args[arg] for arg, key in _ARGS.items() if args.get(arg) is not None}
    if args.get("group_query_attention"):
        keys["num_query_groups"] = args.get("num_query_groups", _ONE_GROUP)
    if not args.get("swiglu") and not args.get("squared_relu") and args.get("openai_gelu"):
        raise SpecError(f"{where}: openai_gelu is not supported")
    keys["activation"] = "fast-swiglu" if args.get("swiglu") else "squared-relu" if args.get("squared_relu") else "gelu"
    keys["normalization"] = _norm({**args, "layernorm_zero_centered_gamma": args.get("apply_layernorm_1p")}, where)
    keys["share_embeddings_and_output_weights"] = not args.get("untie_embeddings_and_output_weights", False)
    if args.get("use_rotary_position_embeddings"):
        keys["position_embedding_type"] = "rope"
    keys.setdefault("position_embedding_type", "learned_absolute")
    spec = _spec(keys, _vocabulary(args, vocab_rows, where), where)
    factor = float(args.get("rope_scaling_factor") or 8.0)
    scaling = RopeScaling(factor=factor) if args.get("use_rope_scaling") else None
    return replace(spec, rope_scaling=_one_scaling(spec, scaling, where))


def _vocabulary(fields: Mapping[str, Any], rows: int, where: str) -> int:
    """Tokens of the model: rows beyond them are padding, and there are never fewer."""
    found = fields.get("vocab_size")
    if found is None:
        return rows
    if type(found) is not int or not 0 < found <= rows:
        raise SpecError(
            f"{where}: vocab_size = {str(found)[:40]}, but the word embedding has {rows} rows",
            rule="a row for every token, and padding behind them",
        )
    return found


def _one_scaling(spec: ModelSpec, llama: RopeScaling | None, where: str) -> AnyScaling | None:
    if llama is not None and isinstance(spec.rope_scaling, LinearScaling):
        raise SpecError(
            f"{where}: linear interpolation by {spec.rope_scaling.factor:g} and Llama 3's scaling at once",
            rule="one scaling of rotary positions",
        )
    return llama or spec.rope_scaling


def _spec(keys: Mapping[str, Any], vocab_size: int, where: str) -> ModelSpec:
    try:
        return spec_from_nemo_config(keys, vocab_size=vocab_size)
    except SpecError as error:
        what = error.what.replace("model_config.yaml", where)
        raise SpecError(what, rule=error.rule, remedy=error.remedy) from error


def _norm(fields: Mapping[str, Any], where: str) -> str:
    kind = fields.get("normalization") or "LayerNorm"
    zero_centred = bool(fields.get("layernorm_zero_centered_gamma"))
    if kind == "RMSNorm":
        return "rmsnorm"  # with layernorm_zero_centered_gamma where that is set
    if kind == "LayerNorm":
        return "layernorm1p" if zero_centred else "layernorm"
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
