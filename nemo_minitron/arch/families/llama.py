"""Llama 2, 3, 3.1, 3.2 and models that use the class, SmolLM2 among them."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, Family
from nemo_minitron.arch.spec import LayerSpec, ModelSpec, RopeScaling
from nemo_minitron.errors import SpecError


def rope_of(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling of a `config.json`, from `rope_parameters` (transformers 5) or the two older keys.

    Raises:
        SpecError: A scaling other than Llama 3.1's.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise SpecError(f"config.json: rope_type = {kind!r} is not supported", rule="default or llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return base, RopeScaling(**{name: rope[name] for name in names})


def read_llama_like(config: Mapping[str, Any], *, family: str, qkv_bias: bool) -> ModelSpec:
    """A spec from a Llama-shaped `config.json`; an absent `head_dim` means `hidden_size / num_attention_heads`.

    Raises:
        SpecError: A key is missing or a setting is not supported.
    """
    try:
        heads = config["num_attention_heads"]
        base, scaling = rope_of(config)
        if config.get("hidden_act", "silu") != "silu":
            raise SpecError(f"config.json: hidden_act = {config['hidden_act']!r} is not supported", rule="silu")
        layer = LayerSpec(
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            ffn_hidden_size=config["intermediate_size"],
        )
        return ModelSpec(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            layers=(layer,) * config["num_hidden_layers"],
            max_position_embeddings=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rotary_base=base,
            rope_scaling=scaling,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias,
        )
    except KeyError as error:
        raise SpecError(f"config.json: key {error} is missing", rule=f"a {family} config has it") from error


def write_llama_like(spec: ModelSpec, *, model_type: str, architecture: str) -> dict[str, Any]:
    """`config.json` data.

    `head_dim` is always explicit, since a pruned model's is not `hidden_size / num_attention_heads`.
    """
    layer = spec.layer
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rotary_base}
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.ffn_hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_query_groups,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rotary_base,
        "tie_word_embeddings": spec.tied_embeddings,
        "attention_dropout": 0.0,
    }
    if spec.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **asdict(spec.rope_scaling)}
        config["rope_scaling"] = scaling
        rope = {**scaling, "rope_theta": spec.rotary_base}
    config["rope_parameters"] = rope
    return config


def _read(config: Mapping[str, Any]) -> ModelSpec:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise SpecError(f"config.json: {key} = true is not supported for Llama", rule="false")
    return read_llama_like(config, family="llama", qkv_bias=False)


def write_mistral(spec: ModelSpec) -> dict[str, Any]:
    """`config.json` data for the Mistral class without a sliding window."""
    return write_llama_like(spec, model_type="mistral", architecture="MistralForCausalLM") | {"sliding_window": None}


def _write(spec: ModelSpec) -> dict[str, Any]:
    if spec.hidden_size % spec.layer.num_attention_heads:
        # transformers refuses such a LlamaConfig, explicit head_dim or not. Its Mistral class computes the same.
        return write_mistral(spec)
    extra = {"attention_bias": False, "mlp_bias": False}
    return write_llama_like(spec, model_type="llama", architecture="LlamaForCausalLM") | extra


LLAMA = Family(
    name="llama",
    hf_model_type="llama",
    hf_architecture="LlamaForCausalLM",
    hf_names=LLAMA_LIKE_NAMES,
    read_config=_read,
    write_config=_write,
)
