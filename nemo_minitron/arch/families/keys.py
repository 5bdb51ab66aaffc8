"""Keys of `config.json`: what a class of transformers assumes where one is missing, and what other formats call it."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.axes import Axis
from nemo_minitron.errors import SpecError

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("n_vocab", "padded_vocab_size"),
    "hidden_size": ("n_embd", "d_model", "model_dim"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim", "d_ff"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv", "num_query_groups", "multi_query_group_num"),
    "head_dim": ("kv_channels", "d_head", "attention_head_dim"),
    "max_position_embeddings": ("n_ctx", "n_positions", "seq_length", "max_seq_len", "model_max_length"),
    "rms_norm_eps": ("norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon"),
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "norm_epsilon"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "hidden_activation": ("hidden_act", "activation_function", "activation"),
    "tie_word_embeddings": ("tie_embeddings", "tied_embeddings", "share_embeddings_and_output_weights"),
    "rope_theta": ("rotary_emb_base", "rotary_base", "rope_base", "rope_freq_base"),
    "partial_rotary_factor": ("rotary_pct", "rotary_percent", "rotary_percentage", "rope_pct"),
    "sliding_window": ("window_size", "attention_window"),
    "bos_token_id": ("bos_id",),
    "eos_token_id": ("eos_id",),
    "pad_token_id": ("pad_id",),
}
"""What other formats and classes call a key. transformers reads none of them for our families, so each of them is
refused where the key itself is missing and its default is another value."""

_GROUP_KEYS = ("n_groups", "mamba_n_groups", "ssm_state_size", "mamba_d_state")
_HEAD_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim")
AXIS_KEYS: dict[Axis, tuple[str, ...]] = {
    Axis.VOCAB: ("vocab_size",),
    Axis.HIDDEN: ("hidden_size",),
    Axis.FFN: ("intermediate_size",),
    Axis.HEAD: _HEAD_KEYS,
    Axis.KV_GROUP: _HEAD_KEYS,
    Axis.HEAD_CHANNEL: ("head_dim",),
    Axis.LAYER: ("num_hidden_layers",),
    Axis.EXPERT: ("num_experts", "num_local_experts", "n_routed_experts"),
    Axis.EXPERT_FFN: ("moe_intermediate_size", "intermediate_size"),
    Axis.SHARED_FFN: (
        *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "n_shared_experts"),
        "moe_intermediate_size",
    ),
    Axis.MAMBA_GROUP: _GROUP_KEYS,
    Axis.MAMBA_HEAD: ("mamba_num_heads", "mamba_n_heads"),
    Axis.MAMBA_CHANNEL: ("mamba_num_heads", "mamba_n_heads", "mamba_head_dim", "mamba_d_head", *_GROUP_KEYS),
    Axis.MAMBA_TAP: ("conv_kernel", "mamba_d_conv"),
    Axis.SINGLE: (),
}
"""Keys of `config.json` that decide the size of an axis."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_KINDS: Mapping[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


def complete(
    config: Mapping[str, Any], defaults: Mapping[str, Any], nullable: tuple[str, ...], *, family: str
) -> dict[str, Any]:
    """The data with every absent key set to what the class assumes.

    Args:
        config: `config.json`.
        defaults: Keys that the class has, with its defaults.
        nullable: Those of them that may be null.
        family: For messages.

    Raises:
        SpecError: A key is null that may not be, is of the wrong kind, or is missing while another format's name for
            it says something else than the default.
    """
    for key, default in defaults.items():
        if key in config:
            _check_kind(key, config[key], default, nullable)
    for key, names in OTHER_NAMES.items():
        if key in config or key not in (*defaults, "rope_theta", "partial_rotary_factor") or _in_rope(config, key):
            continue
        assumed = defaults.get(key, 10000.0 if key == "rope_theta" else None)
        for name in names:
            if name in config and name not in defaults and config[name] not in (None, assumed):
                raise SpecError(
                    f"config.json: {key} is missing, and {name} = {str(config[name])[:40]!r} is no key of {family}",
                    rule=f"{key}; the class of transformers overlooks {name} and assumes {assumed!r}",
                    remedy=f"call it {key} if that is what it means, else take it out",
                )
    return {**defaults, **config}


def assumed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that a `config.json` does not have, with what the class takes in their place."""
    return {key: value for key, value in defaults.items() if key not in config and value is not None}


def special_ids(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the special tokens as `config.json` has them, the class's own where it is silent; null is None."""
    return {key: config.get(key, defaults.get(key)) for key in SPECIAL_IDS}


def _check_kind(key: str, value: Any, default: Any, nullable: tuple[str, ...]) -> None:
    if value is None:
        if default is None or key in nullable:
            return
        raise SpecError(f"config.json: {key} = null", rule="a value, or no such key", remedy=f"default: {default!r}")
    kinds, words = _KINDS.get(type(default), ((), ""))
    if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
        if key in SPECIAL_IDS and isinstance(value, list):
            return
        raise SpecError(f"config.json: {key} = {str(value)[:40]!r} is of the wrong kind", rule=words)


def _in_rope(config: Mapping[str, Any], key: str) -> bool:
    found = (config.get("rope_parameters"), config.get("rope_scaling"))
    return any(isinstance(rope, Mapping) and key in rope for rope in found)
