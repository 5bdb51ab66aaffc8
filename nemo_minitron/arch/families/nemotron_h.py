"""Nemotron-H, Nemotron Nano 2 and Nemotron 3 Nano: layers with one part each.

That is Mamba-2, attention without positions, a squared-ReLU MLP, or experts (`nemotron_h_experts`).
"""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import Family
from nemo_minitron.arch.families.hybrid import first_mamba, shared_sizes
from nemo_minitron.arch.families.nemotron_h_experts import FREE_TRAITS, SETTINGS, TRAITS, read_experts, write_experts
from nemo_minitron.arch.hybrid_fields import LETTERS
from nemo_minitron.arch.layer import Attention, LayerSpec, Mamba, Mlp, Moe
from nemo_minitron.arch.spec import Activation, ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX
from nemo_minitron.errors import SpecError

_HF_LAYER = "backbone.layers.{i}."
_MIXER = _HF_LAYER + "mixer."
_NORM = (_HF_LAYER + "norm.weight",)

_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("backbone.embeddings.weight",),
    LAYER_PREFIX + "self_attention.linear_qkv.layer_norm_weight": _NORM,
    LAYER_PREFIX + "self_attention.linear_qkv.weight": tuple(_MIXER + f"{part}_proj.weight" for part in "qkv"),
    LAYER_PREFIX + "self_attention.linear_proj.weight": (_MIXER + "o_proj.weight",),
    LAYER_PREFIX + "mixer.in_proj.layer_norm_weight": _NORM,
    **{
        LAYER_PREFIX + f"mixer.{name}": (_MIXER + name,)
        for name in (
            *("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D"),
            *("norm.weight", "out_proj.weight"),
        )
    },
    LAYER_PREFIX + "mlp.linear_fc1.layer_norm_weight": _NORM,
    LAYER_PREFIX + "mlp.linear_fc1.weight": (_MIXER + "up_proj.weight",),
    LAYER_PREFIX + "mlp.linear_fc2.weight": (_MIXER + "down_proj.weight",),
    LAYER_PREFIX + "pre_mlp_layernorm.weight": _NORM,
    LAYER_PREFIX + "mlp.router.weight": (_MIXER + "gate.weight",),
    LAYER_PREFIX + "mlp.router.expert_bias": (_MIXER + "gate.e_score_correction_bias",),
    **{
        LAYER_PREFIX + f"mlp.{ours}.linear_{linear}.weight": (_MIXER + f"{theirs}.{projection}_proj.weight",)
        for ours, theirs in (("experts.local_experts.{e}", "experts.{e}"), ("shared_experts", "shared_experts"))
        for linear, projection in (("fc1", "up"), ("fc2", "down"))
    },
    "decoder.final_layernorm.weight": ("backbone.norm_f.weight",),
    "output_layer.weight": ("lm_head.weight",),
}

# What NemotronHConfig assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 21_504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mlp_hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_min": 0.001,
    "chunk_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Settings of which the class computes one value only, or which nothing here computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "mamba_proj_bias": (None, False),
    "residual_in_fp32": (None, False),
    "num_nextn_predict_layers": (None, 0),
}
# The class takes these in place of its own keys.
_OTHER_KEYS = (
    *("mamba_n_groups", "mamba_d_conv", "mamba_expand", "mamba_dt_min", "mamba_dt_max", "mamba_dt_limit"),
    *("mamba_dt_init_floor", "mamba_conv_bias", "mamba_chunk_size"),
)
# What transformers calls layers, and what it called them before.
_Kind = type[Attention | Mamba | Mlp | Moe]
_KINDS: dict[str, _Kind] = {
    "linear_attention": Mamba,
    "mamba": Mamba,
    "full_attention": Attention,
    "attention": Attention,
    "mlp": Mlp,
    "moe": Moe,
}
_NAME_OF: dict[type, str] = {Mamba: "linear_attention", Attention: "full_attention", Mlp: "mlp", Moe: "moe"}
_LETTERS = {letter: _NAME_OF[kind] for letter, kind in LETTERS.items()}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    for key, allowed in _ONLY.items():
        if config.get(key) not in allowed:
            raise SpecError(f"config.json: {key} = {str(config[key])[:40]!r} is not supported", rule=f"{allowed[-1]!r}")
    if found := [key for key in _OTHER_KEYS if key in config]:
        raise SpecError(f"config.json: {found[0]} is not supported", rule="keys as NemotronHConfig writes them")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    kinds = _kinds(config)
    try:
        parts: dict[_Kind, LayerSpec] = {
            Attention: LayerSpec(
                mixer=Attention(num_attention_heads=heads, num_query_groups=heads if groups is None else groups),
                feed_forward=None,
            ),
            Mamba: LayerSpec(mixer=_mamba(config), feed_forward=None),
            Mlp: LayerSpec(mixer=None, feed_forward=Mlp(ffn_hidden_size=config["intermediate_size"])),
        }
        if Moe in kinds:
            parts[Moe] = LayerSpec(mixer=None, feed_forward=read_experts(config))
        return ModelSpec(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            head_dim=config["head_dim"],
            layers=tuple(parts[kind] for kind in kinds),
            max_position_embeddings=config["max_position_embeddings"],
            activation=Activation.SQUARED_RELU,
            norm_eps=config["layer_norm_epsilon"],
            rotary_percent=0.0,
            tied_embeddings=config["tie_word_embeddings"],
        )
    except TypeError as error:
        raise SpecError(f"config.json: a value is of the wrong kind ({error})") from error


def _mamba(config: Mapping[str, Any]) -> Mamba:
    return Mamba(
        mamba_num_heads=config["mamba_num_heads"],
        mamba_head_dim=config["mamba_head_dim"],
        mamba_state_dim=config["ssm_state_size"],
        mamba_num_groups=config["n_groups"],
        conv_kernel=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
        dt_min=float(config["time_step_min"]),
        chunk_size=config["chunk_size"],
    )


def _kinds(config: Mapping[str, Any]) -> list[_Kind]:
    """The kind of each layer, from a list of names or a pattern of letters; where both are there, they agree.

    Raises:
        SpecError: Neither is there, they differ, or a layer is of a kind that is not supported.
    """
    pattern = config.get("hybrid_override_pattern")
    lists = [config[key] for key in ("layers_block_type", "layer_types") if config.get(key) is not None]
    if pattern is not None:
        if not isinstance(pattern, str) or set(pattern) - set(_LETTERS):
            raise SpecError(
                f"config.json: hybrid_override_pattern = {str(pattern)[:60]!r}",
                rule="letters M, *, -, E for each layer",
            )
        lists.append([_LETTERS[letter] for letter in pattern])
    if not lists:
        raise SpecError("config.json: hybrid_override_pattern is missing", rule="that, or layers_block_type")
    found: list[list[_Kind]] = []
    for names in lists:
        if not isinstance(names, list) or (strange := [name for name in names if name not in _KINDS]):
            shown = strange[0] if isinstance(names, list) else names
            raise SpecError(
                f"config.json: a layer of kind {str(shown)[:40]!r} is not supported",
                rule="Mamba, attention, an MLP or experts",
            )
        found.append([_KINDS[name] for name in names])
    if any(kinds != found[0] for kinds in found[1:]):
        raise SpecError(
            "config.json: hybrid_override_pattern and layers_block_type differ",
            rule="both name the kind of each layer",
            remedy="keep the one that is meant",
        )
    return found[0]


def _write(spec: ModelSpec) -> dict[str, Any]:
    sizes = shared_sizes(spec, "NemotronHConfig")
    mamba = first_mamba(spec)
    names = [_NAME_OF[type(layer.parts[0])] for layer in spec.layers]
    letters = {name: letter for letter, name in _LETTERS.items()}
    config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "hybrid_override_pattern": "".join(letters[name] for name in names),
        "layers_block_type": names,
        "head_dim": spec.head_dim,
        **{key: sizes[name] for key, name in _SIZE_KEYS.items() if name in sizes},
        "max_position_embeddings": spec.max_position_embeddings,
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        **dict.fromkeys(("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias", "residual_in_fp32"), False),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if mamba is not None:
        config |= {
            "conv_kernel": mamba.conv_kernel,
            "use_conv_bias": mamba.conv_bias,
            "time_step_min": mamba.dt_min,
            "chunk_size": mamba.chunk_size,
        }
    if experts := write_experts(spec):
        # Without MLPs nothing is made of it; the published model has the experts' size there too.
        config |= {"intermediate_size": experts["moe_intermediate_size"], **config, **experts}
    return config


_SIZE_KEYS = {
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "ssm_state_size": "mamba_state_dim",
    "n_groups": "mamba_num_groups",
}


NEMOTRON_H = Family(
    name="nemotron_h",
    hf_model_type="nemotron_h",
    hf_architecture="NemotronHForCausalLM",
    hf_names=_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=(
        *("layer_types", "layers_block_type", "hybrid_override_pattern"),
        *SETTINGS,
        *("mamba_proj_bias", "residual_in_fp32", "num_nextn_predict_layers"),
    ),
    fixed={"activation": Activation.SQUARED_RELU, "rotary_percent": 0.0},
    free=(),  # the class ties no weights, whatever tie_word_embeddings says
    experts=TRAITS,
    free_experts=FREE_TRAITS,
    experts_are_optional=True,
    layer=lambda layer: len(layer.parts) == 1,
)
