"""Bamba: each layer is Mamba-2 or attention with partly rotary positions, and a gated MLP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.families.common import read_common
from nemo_minitron.arch.families.hybrid import first_mamba, shared_sizes
from nemo_minitron.arch.layer import Attention, LayerSpec, Mamba, Mlp
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX
from nemo_minitron.errors import SpecError

_ARCHITECTURE = "BambaForCausalLM"
_HF_LAYER = "model.layers.{i}."
_MIXER, _MLP = _HF_LAYER + "mamba.", _HF_LAYER + "feed_forward."

_NAMES: dict[str, tuple[str, ...]] = LLAMA_LIKE_NAMES | {
    LAYER_PREFIX + "mixer.in_proj.layer_norm_weight": (_HF_LAYER + "input_layernorm.weight",),
    **{
        LAYER_PREFIX + f"mixer.{name}": (_MIXER + name,)
        for name in (
            *("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D"),
            *("norm.weight", "out_proj.weight"),
        )
    },
    LAYER_PREFIX + "mlp.linear_fc1.layer_norm_weight": (_HF_LAYER + "pre_ff_layernorm.weight",),
    LAYER_PREFIX + "mlp.linear_fc1.weight": (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
    LAYER_PREFIX + "mlp.linear_fc2.weight": (_MLP + "down_proj.weight",),
    "decoder.final_layernorm.weight": ("model.final_layernorm.weight",),
}

# What BambaConfig assumes; `mamba_d_head` is missing, since that is a number or "auto".
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attn_layer_indices": None,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEAD_SIZE, _LIMIT = "mamba_d_head", "time_step_limit"
_PERCENT = 0.5
"""Of a head's channels that turn with the position: the class has it built in."""
_INFINITE = (float("inf"), {"__float__": "Infinity"})
"""How transformers writes it, before version 5 and since."""


def _read(config: Mapping[str, Any]) -> ModelSpec:
    if config.get("mamba_proj_bias") not in (None, False):
        raise SpecError(f"config.json: mamba_proj_bias = {config['mamba_proj_bias']!r} is not supported", rule="False")
    if "layers_block_type" in config:
        raise SpecError("config.json: layers_block_type is not supported", rule="attn_layer_indices says it")
    limit = config.get(_LIMIT, (0.0, _INFINITE[0]))
    if not isinstance(limit, list | tuple) or len(limit) != 2 or limit[0] != 0 or limit[1] not in _INFINITE:
        raise SpecError(
            f"config.json: {_LIMIT} = {str(limit)[:60]} is not supported",
            rule="[0, infinity]; the class keeps to other limits except where it generates text with its cache",
        )
    spec = read_common(config, family="bamba", rotary_percent=_PERCENT)
    with_attention = config["attn_layer_indices"] or []
    if not isinstance(with_attention, list) or any(
        type(index) is not int or not 0 <= index < spec.num_layers for index in with_attention
    ):
        raise SpecError(
            f"config.json: attn_layer_indices = {str(with_attention)[:60]}",
            rule=f"a list of numbers of layers, 0 to {spec.num_layers - 1}",
        )
    mixer = _mamba(config)
    layers = enumerate(spec.layers)
    return replace(
        spec, layers=tuple(each if at in with_attention else replace(each, mixer=mixer) for at, each in layers)
    )


def _mamba(config: Mapping[str, Any]) -> Mamba:
    heads, inner = config["mamba_n_heads"], config["mamba_expand"] * config["hidden_size"]
    size = config.get(_HEAD_SIZE, "auto")
    size = inner // max(heads, 1) if size == "auto" else size
    if type(size) is not int or heads * size != inner:
        raise SpecError(
            f"config.json: mamba_n_heads = {heads} and {_HEAD_SIZE} = {str(size)[:40]!r}, but "
            f"mamba_expand * hidden_size = {inner}",
            rule=f"heads times channels of a head are that, or {_HEAD_SIZE} is 'auto'",
        )
    return Mamba(
        mamba_num_heads=heads,
        mamba_head_dim=size,
        mamba_state_dim=config["mamba_d_state"],
        mamba_num_groups=config["mamba_n_groups"],
        conv_kernel=config["mamba_d_conv"],
        conv_bias=config["mamba_conv_bias"],
        chunk_size=config["mamba_chunk_size"],
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    # Where no layer has a mixer of a kind, sizes that the class takes, and that nothing is made of.
    sizes = {"num_attention_heads": 1, "num_query_groups": 1} | shared_sizes(spec, "BambaConfig")
    absent = Mamba(mamba_num_heads=1, mamba_head_dim=spec.hidden_size, mamba_state_dim=1, mamba_num_groups=1)
    mamba = first_mamba(spec) or absent
    _check_mamba(mamba, spec.hidden_size)
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "bamba",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": sizes["ffn_hidden_size"],
        "num_hidden_layers": spec.num_layers,
        "attn_layer_indices": [at for at, layer in enumerate(spec.layers) if isinstance(layer.mixer, Attention)],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_query_groups"],
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rotary_base,
        "partial_rotary_factor": _PERCENT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rotary_base,
            "partial_rotary_factor": _PERCENT,
        },
        "tie_word_embeddings": spec.tied_embeddings,
        **dict.fromkeys(("attention_bias", "mlp_bias", "mamba_proj_bias"), False),
        "attention_dropout": 0.0,
        "mamba_n_heads": mamba.mamba_num_heads,
        _HEAD_SIZE: mamba.mamba_head_dim,
        "mamba_n_groups": mamba.mamba_num_groups,
        "mamba_d_state": mamba.mamba_state_dim,
        "mamba_d_conv": mamba.conv_kernel,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_expand": mamba.inner_size // spec.hidden_size,
        "mamba_chunk_size": mamba.chunk_size,
    }


def _check_mamba(mamba: Mamba, hidden_size: int) -> None:
    """Refuse what the class cannot be told.

    Raises:
        SpecError: Names what.
    """
    if mamba.dt_min:
        raise SpecError(
            f"{_ARCHITECTURE} does not compute dt_min = {mamba.dt_min}", rule=f"{_LIMIT}: from 0, see docs/formats.md"
        )
    if mamba.inner_size % hidden_size:
        raise SpecError(
            f"{_ARCHITECTURE} cannot have {mamba.mamba_num_heads} Mamba heads of {mamba.mamba_head_dim} channels with "
            f"hidden_size = {hidden_size}",
            rule="BambaConfig has a whole number, mamba_expand, times hidden_size channels of all heads",
            remedy="choose target.mamba_num_heads, mamba_head_dim or hidden_size so, or export.formats=[nemo]",
        )


def _holds(spec: ModelSpec, sizes: Mapping[str, Any]) -> Any:
    """As `_check_mamba`, over sizes."""
    if first_mamba(spec) is None:
        return True
    return sizes["mamba_num_heads"] * sizes["mamba_head_dim"] % sizes["hidden_size"] == 0


def _has_layer(layer: LayerSpec) -> bool:
    return isinstance(layer.mixer, Attention | Mamba) and isinstance(layer.feed_forward, Mlp)


BAMBA = Family(
    name="bamba",
    hf_model_type="bamba",
    hf_architecture=_ARCHITECTURE,
    hf_names=_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=("head_dim", "mamba_d_head", "mamba_proj_bias", "time_step_limit"),
    fixed={"rotary_percent": _PERCENT},
    layer=_has_layer,
    holds=_holds,
)
