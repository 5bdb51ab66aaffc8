"""NeMo-1 `model_config.yaml` keys of an architecture, and back. Plain data, no NeMo."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families import nearest_family
from nemo_minitron.arch.settings import (
    check_window,
    has_plain_layers,
    settings_in,
    shared_size,
    spec_from_settings,
    vocab_divisor,
    vocabulary,
    window_of,
)
from nemo_minitron.arch.spec import Activation, LinearScaling, ModelSpec, Norm, RopeScaling
from nemo_minitron.errors import SpecError

_WHERE = "model_config.yaml"
LEGACY_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
"""The class that NeMo-1 era tools look for; our own reader never resolves it."""

SPEC_NAME = "te_gpt"
"""NeMo-1's name for layers of Transformer Engine."""
NOT_REPRESENTABLE_NAME = "nemo_minitron"
"""In its place where NeMo-1's keys cannot say what the model computes. NeMo-1 knows no such layers and stops before it
computes something else; our own reader takes the architecture from `minitron.spec`."""

_ACTIVATIONS = {
    Activation.SWIGLU: "fast-swiglu",
    Activation.GEGLU: "fast-geglu",
    Activation.GEGLU_TANH: "fast-geglu",  # with openai_gelu
    Activation.GELU: "gelu",
    Activation.SQUARED_RELU: "squared-relu",
}
_ACTIVATIONS_READ = {
    "fast-swiglu": Activation.SWIGLU,
    "swiglu": Activation.SWIGLU,
    "fast-geglu": Activation.GEGLU,
    "geglu": Activation.GEGLU,
    "gelu": Activation.GELU,
    "squared-relu": Activation.SQUARED_RELU,
}
_NORMS = {
    Norm.RMSNORM: "rmsnorm",
    Norm.RMSNORM1P: "rmsnorm",  # with layernorm_zero_centered_gamma
    Norm.LAYERNORM: "layernorm",
    Norm.LAYERNORM1P: "layernorm1p",
}
KEYS = {
    **{name: name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
    **{name: name for name in ("num_query_groups", "max_position_embeddings", "rotary_base", "qkv_bias")},
    "head_dim": "kv_channels",
    "other_positions": "encoder_seq_length",
    "norm_eps": "layernorm_epsilon",
    "zero_centred_norm": "layernorm_zero_centered_gamma",
    "rotary_percent": "rotary_percentage",
    "rotary_interleaved": "rotary_interleaved",
    "linear_factor": "seq_len_interpolation_factor",
    "position_embedding": "position_embedding_type",
    "window": "window_size",
    "experts": "num_moe_experts",
    "linear_bias": "bias",
    "qk_norm": "qk_layernorm",
    "scaled_embeddings": "apply_embedding_scaling",
    "tied_embeddings": "share_embeddings_and_output_weights",
}
"""NeMo 1's keys by the names of `arch.settings`."""
_OTHER_FLAGS = ("openai_gelu", "scale_positional_embedding")
_CHANGED_BY_TRAINING = ("encoder_seq_length", "make_vocab_size_divisible_by")
# NeMo-1 knows one rotary scaling, with these constants built in.
_LLAMA_31_SCALING = RopeScaling(factor=8.0)


def nemo_config(
    spec: ModelSpec,
    *,
    family: str | None = None,
    precision: str = "bf16",
    tokenizer: Mapping[str, Any] | None = None,
    minitron: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`model_config.yaml` data.

    Args:
        spec: The architecture; stored complete under `minitron.spec`, so that nothing is lost.
        family: Key of `arch.families`; None for the nearest one.
        precision: NeMo's `precision` key: "bf16" or "32".
        tokenizer: NeMo's `tokenizer` section.
        minitron: More data for our own section (lineage, artifact names). Everything of ours sits under this one
            key, since NeMo-1 copies any key that is named like a field of Megatron's configuration.
    """
    return {
        "mcore_gpt": True,
        "transformer_engine": True,
        "name": SPEC_NAME if is_representable(spec) else NOT_REPRESENTABLE_NAME,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        **_architecture_keys(spec),
        **_FIXED,
        "precision": precision,
        "tokenizer": dict(tokenizer or {}),
        "minitron": {"spec": spec.to_dict(), "family": family or nearest_family(spec), **(minitron or {})},
        "target": LEGACY_TARGET,
    }


def is_representable(spec: ModelSpec) -> bool:
    """Whether NeMo-1's own keys describe a model without `minitron.spec`."""
    scaling = spec.rope_scaling in (None, _LLAMA_31_SCALING) or isinstance(spec.rope_scaling, LinearScaling)
    return scaling and has_plain_layers(spec)


def _architecture_keys(spec: ModelSpec) -> dict[str, Any]:
    return {
        "encoder_seq_length": spec.max_position_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": shared_size(spec, "ffn_hidden_size"),
        "num_attention_heads": shared_size(spec, "num_attention_heads"),
        "num_query_groups": shared_size(spec, "num_query_groups"),
        "kv_channels": spec.head_dim,
        "normalization": _NORMS[spec.norm],
        "layernorm_zero_centered_gamma": spec.norm.zero_centred,
        "layernorm_epsilon": spec.norm_eps,
        "activation": _ACTIVATIONS[spec.activation],
        "openai_gelu": spec.activation is Activation.GEGLU_TANH,
        "apply_embedding_scaling": spec.scaled_embeddings,
        "bias": spec.linear_bias,
        "qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm,
        "position_embedding_type": "rope",
        "rotary_percentage": spec.rotary_percent,
        "rotary_base": spec.rotary_base,
        # Positions to the left of a query, and to its right; absent where every position is seen.
        **({"window_size": window} if (window := window_of(spec)) is not None else {}),
        "seq_len_interpolation_factor": linear.factor
        if isinstance(linear := spec.rope_scaling, LinearScaling)
        else None,
        "scale_positional_embedding": spec.rope_scaling == _LLAMA_31_SCALING,
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        "make_vocab_size_divisible_by": vocab_divisor(spec.vocab_size),
        "override_vocab_size": spec.vocab_size,
    }


_FIXED: dict[str, Any] = {
    "init_method_std": 0.02,
    "use_scaled_init_method": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
    "apply_query_key_layer_scaling": False,
    "do_layer_norm_weight_decay": False,
    "pre_process": True,
    "post_process": True,
    "persist_layer_norm": True,
    "headscale": False,
    "transformer_block_type": "pre_ln",
    "normalize_attention_scores": True,
    "attention_type": "multihead",
    "megatron_amp_O2": False,
    "native_amp_init_scale": 4294967296,
    "native_amp_growth_interval": 1000,
    "hysteresis": 2,
    "fp32_residual_connection": False,
    "fp16_lm_cross_entropy": False,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": True,
    "get_attention_mask_from_fusion": True,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "seed": 1234,
    "resume_from_checkpoint": None,
    "use_cpu_initialization": False,
    "onnx_safe": False,
    "gradient_as_bucket_view": True,
    "sync_batch_comm": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "fp8": False,
    "dist_ckpt_format": "torch_dist",
}


def spec_from_nemo_config(config: Mapping[str, Any], *, vocab_size: int | None = None) -> ModelSpec:
    """The architecture of a `model_config.yaml`: from `minitron.spec` where there is one, else from NeMo's own keys.

    Args:
        config: Plain data (interpolations resolved).
        vocab_size: Rows of the stored embedding; `override_vocab_size` names fewer where some are padding.

    Raises:
        SpecError: A key is missing, a setting is not supported, or `minitron.spec` contradicts NeMo's keys.
    """
    minitron = config.get("minitron") or {}
    recorded = minitron.get("spec") if isinstance(minitron, Mapping) else minitron
    if recorded is not None and not isinstance(recorded, Mapping):
        raise SpecError(f"model_config.yaml: minitron.spec = {str(recorded)[:40]}", rule="a mapping, as we write it")
    if recorded is None:
        return _from_nemo_keys(config, vocab_size)
    _refuse({key: value for key, value in config.items() if key != "name"})
    spec = ModelSpec.from_dict(dict(recorded))
    for key, expected in _architecture_keys(spec).items():
        if key in config and key not in _CHANGED_BY_TRAINING and config[key] != expected:
            raise SpecError(
                f"model_config.yaml: {key} = {str(config[key])[:60]}, but minitron.spec says {expected}",
                rule="both describe the weights",
                remedy="change sizes by pruning, not by editing the file",
            )
    return spec


def lineage_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a model comes from (base model, licence, plan), as its writer recorded it; {} when nobody did."""
    recorded = (config.get("minitron") or {}).get("lineage")
    return dict(recorded) if isinstance(recorded, Mapping) else {}


def _from_nemo_keys(config: Mapping[str, Any], vocab_size: int | None) -> ModelSpec:
    _refuse(config)
    for key in _OTHER_FLAGS:
        if config.get(key) not in (None, True, False):
            raise SpecError(f"{_WHERE}: {key} = {str(config[key])[:40]}", rule="true or false")
    try:
        return spec_from_settings(
            settings_in(config, KEYS),
            KEYS,
            where=_WHERE,
            vocab_size=vocabulary(config.get("override_vocab_size"), "override_vocab_size", vocab_size, where=_WHERE),
            activation=_activation(config),
            norm=_norm(config),
            rope_scaling=_LLAMA_31_SCALING if config.get("scale_positional_embedding") else None,
        )
    except (TypeError, ValueError) as error:
        raise SpecError(f"{_WHERE}: {error}") from error


def _refuse(config: Mapping[str, Any]) -> None:
    """Settings without counterpart in a spec that change what a model computes.

    Raises:
        SpecError: There is one; names it.
    """
    supported = {
        "name": ("", SPEC_NAME, "megatron_gpt_full_te_layer_autocast", "modelopt"),
        "position_embedding_type": ("rope",),
        "transformer_block_type": ("pre_ln",),
        "headscale": (),
        "normalize_attention_scores": (True,),
        "multi_query_attention": (),
        "attention_type": ("multihead",),
        "num_moe_experts": (),
        "rotary_interleaved": (),
        "mcore_customization_config": (),
    }
    for key, values in supported.items():
        found = config.get(key)
        if not (found is None or found in values if values else not found):
            rule = " or ".join(map(repr, values)) if values else "absent"
            raise SpecError(f"{_WHERE}: {key} = {found!r} is not supported", rule=rule)
    check_window(config.get("window_size"), KEYS, where=_WHERE)


def _activation(config: Mapping[str, Any]) -> Activation:
    name = config.get("activation", "gelu")
    if not isinstance(name, str) or name not in _ACTIVATIONS_READ:
        raise SpecError(f"model_config.yaml: activation = {name!r} is not supported")
    found = _ACTIVATIONS_READ[name]
    if not config.get("openai_gelu"):
        return found
    if found is not Activation.GEGLU:
        raise SpecError(f"model_config.yaml: openai_gelu = true is not supported with activation = {name!r}")
    return Activation.GEGLU_TANH


def _norm(config: Mapping[str, Any]) -> Norm:
    name = config.get("normalization", "layernorm")
    if name not in list(Norm):
        raise SpecError(f"model_config.yaml: normalization = {name!r} is not supported", rule=", ".join(Norm))
    found = Norm(name)
    if not config.get("layernorm_zero_centered_gamma"):
        return found
    return Norm.RMSNORM1P if found is Norm.RMSNORM else Norm.LAYERNORM1P
