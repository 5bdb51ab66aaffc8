"""NeMo-1 `model_config.yaml` keys of an architecture, and back. Plain data, no NeMo."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families import with_family
from nemo_minitron.arch.spec import Activation, LayerSpec, LinearScaling, ModelSpec, Norm, RopeScaling
from nemo_minitron.errors import SpecError

LEGACY_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
"""The class that NeMo-1 era tools look for; our own reader never resolves it."""

SPEC_NAME = "te_gpt"
"""NeMo-1's name for layers of Transformer Engine."""
UNSAYABLE_NAME = "nemo_minitron"
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
_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("max_position_embeddings", "encoder_seq_length"),
)
_FLAGS = (
    *("layernorm_zero_centered_gamma", "openai_gelu", "apply_embedding_scaling", "bias", "qkv_bias", "qk_layernorm"),
    *("scale_positional_embedding", "share_embeddings_and_output_weights"),
)
_NUMBERS = ("layernorm_epsilon", "rotary_base", "rotary_percentage")
# What NeMo-1 assumes where a key is absent, where that is not what we support.
_NEMO_DEFAULTS = {"position_embedding_type": "learned_absolute"}
_CHANGED_BY_TRAINING = ("encoder_seq_length", "make_vocab_size_divisible_by")
# NeMo-1 knows one rotary scaling, with these constants built in.
_LLAMA_31_SCALING = RopeScaling(factor=8.0)
_LARGEST_VOCAB_DIVISOR = 128


def nemo_config(
    spec: ModelSpec,
    *,
    precision: str = "bf16",
    tokenizer: Mapping[str, Any] | None = None,
    minitron: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`model_config.yaml` data.

    Args:
        spec: The architecture; stored whole under `minitron.spec`, so that nothing is lost.
        precision: NeMo's `precision` key: "bf16" or "32".
        tokenizer: NeMo's `tokenizer` section.
        minitron: More data for our own section (lineage, artifact names). Everything of ours sits under this one
            key, since NeMo-1 copies any key that is named like a field of Megatron's configuration.
    """
    return {
        "mcore_gpt": True,
        "transformer_engine": True,
        "name": SPEC_NAME if says_all(spec) else UNSAYABLE_NAME,
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
        "minitron": {"spec": spec.to_dict(), **(minitron or {})},
        "target": LEGACY_TARGET,
    }


def says_all(spec: ModelSpec) -> bool:
    """Whether NeMo-1's own keys describe a model without `minitron.spec`."""
    mixed = len({layer.local for layer in spec.layers}) > 1
    scaling = spec.rope_scaling in (None, _LLAMA_31_SCALING) or isinstance(spec.rope_scaling, LinearScaling)
    return spec.is_uniform and scaling and not (spec.post_norms or mixed or spec.query_scalar or spec.local_rotary_base)


def _architecture_keys(spec: ModelSpec) -> dict[str, Any]:
    def shared(name: str) -> int | None:
        """A size that all layers have; None makes a reader that knows only uniform models stop, not guess."""
        values = {getattr(layer, name) for layer in spec.layers}
        return int(values.pop()) if len(values) == 1 else None

    return {
        "encoder_seq_length": spec.max_position_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": shared("ffn_hidden_size"),
        "num_attention_heads": shared("num_attention_heads"),
        "num_query_groups": shared("num_query_groups"),
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
        **({"window_size": [spec.sliding_window - 1, 0]} if spec.sliding_window and spec.layers[0].local else {}),
        "seq_len_interpolation_factor": linear.factor
        if isinstance(linear := spec.rope_scaling, LinearScaling)
        else None,
        "scale_positional_embedding": spec.rope_scaling == _LLAMA_31_SCALING,
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        "make_vocab_size_divisible_by": _vocab_divisor(spec.vocab_size),
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
    _refuse({key: value for key, value in config.items() if key != "name"}, defaults={})
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
    _check_numbers(config)
    try:
        heads = config["num_attention_heads"]
        window = config.get("window_size")
        layer = LayerSpec(
            num_attention_heads=heads,
            num_query_groups=heads if config.get("num_query_groups") is None else config["num_query_groups"],
            ffn_hidden_size=config["ffn_hidden_size"],
            local=window is not None,
        )
        vocabulary = config.get("override_vocab_size")
        if vocab_size is None and vocabulary is not None and (type(vocabulary) is not int or vocabulary < 1):
            raise SpecError(f"model_config.yaml: override_vocab_size = {vocabulary}", rule="a positive integer")
        if vocabulary is None:
            vocabulary = vocab_size
        if vocabulary is None:
            raise SpecError("model_config.yaml: override_vocab_size is missing, and no weights say the vocabulary")
        if vocab_size is not None and (type(vocabulary) is not int or not 0 < vocabulary <= vocab_size):
            raise SpecError(
                f"model_config.yaml: override_vocab_size = {vocabulary}, but the word embedding has {vocab_size} rows",
                rule="a row for every token, and padding behind them",
            )
        return with_family(
            ModelSpec(
                family="",
                vocab_size=vocabulary,
                hidden_size=config["hidden_size"],
                head_dim=config["hidden_size"] // heads if config.get("kv_channels") is None else config["kv_channels"],
                layers=(layer,) * config["num_layers"],
                max_position_embeddings=_positions(config),
                activation=_activation(config),
                norm=_norm(config),
                norm_eps=float(config.get("layernorm_epsilon", 1e-5)),
                rotary_base=float(config.get("rotary_base", 10000.0)),
                rotary_percent=float(config.get("rotary_percentage", 1.0)),
                rope_scaling=_scaling(config),
                tied_embeddings=bool(config.get("share_embeddings_and_output_weights", True)),
                qkv_bias=bool(config.get("qkv_bias", False)),
                qk_norm=bool(config.get("qk_layernorm", False)),
                linear_bias=bool(config.get("bias", True)),
                scaled_embeddings=bool(config.get("apply_embedding_scaling", False)),
                sliding_window=None if window is None else window[0] + 1,
            )
        )
    except KeyError as error:
        raise SpecError(f"model_config.yaml: key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise SpecError(f"model_config.yaml: {error}") from error


def _refuse(config: Mapping[str, Any], *, defaults: Mapping[str, Any] = _NEMO_DEFAULTS) -> None:
    """Settings that change what a model computes and that nothing here computes.

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
        found = config.get(key, defaults.get(key))
        if not (found is None or found in values if values else not found):
            rule = " or ".join(map(repr, values)) if values else "absent"
            raise SpecError(f"model_config.yaml: {key} = {found!r} is not supported", rule=rule)
    window = config.get("window_size")
    is_pair = isinstance(window, list | tuple) and len(window) == 2 and all(type(each) is int for each in window)
    if window is not None and not (is_pair and window[0] >= 0 and window[1] == 0):
        raise SpecError(f"model_config.yaml: window_size = {window} is not supported", rule="[positions, 0]")


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raise SpecError with the name of a size that is no positive integer, or of a number or flag that is none."""
    for key in _FLAGS:
        if config.get(key) not in (None, True, False):
            raise SpecError(f"model_config.yaml: {key} = {str(config[key])[:40]}", rule="true or false")
    for key in _SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise SpecError(f"model_config.yaml: {key} = {str(value)[:40]}", rule="a positive integer")
    for key in _NUMBERS:
        try:
            is_positive = float(config.get(key, 1.0)) > 0
        except (TypeError, ValueError):
            is_positive = False
        if not is_positive:
            raise SpecError(f"model_config.yaml: {key} = {str(config[key])[:40]}", rule="a positive number")


def _positions(config: Mapping[str, Any]) -> Any:
    for key in ("max_position_embeddings", "encoder_seq_length"):
        if config.get(key) is not None:
            return config[key]
    raise SpecError(
        "model_config.yaml: max_position_embeddings is missing",
        rule="max_position_embeddings, or encoder_seq_length (seq_length in NeMo 2) in its place",
    )


def _scaling(config: Mapping[str, Any]) -> RopeScaling | LinearScaling | None:
    factor, llama = config.get("seq_len_interpolation_factor"), config.get("scale_positional_embedding")
    if factor is not None and (type(factor) not in (int, float) or factor <= 0 or llama):
        raise SpecError(
            f"model_config.yaml: seq_len_interpolation_factor = {str(factor)[:40]}",
            rule="a positive number, without scale_positional_embedding",
        )
    return _LLAMA_31_SCALING if llama else LinearScaling(factor=float(factor)) if factor is not None else None


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


def _vocab_divisor(vocab_size: int) -> int:
    """Largest power of two up to 128 that divides the vocabulary, so that one rank pads nothing."""
    return min(vocab_size & -vocab_size, _LARGEST_VOCAB_DIVISOR)
