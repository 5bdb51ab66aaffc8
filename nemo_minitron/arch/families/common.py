"""Reading and writing the keys of `config.json` that every family shares."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nemo_minitron.arch.spec import LayerSpec, ModelSpec, RopeScaling
from nemo_minitron.errors import SpecError

_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_common(
    config: Mapping[str, Any],
    *,
    family: str,
    activation_name: str = "silu",
    activation_key: str = "hidden_act",
    eps_key: str = "rms_norm_eps",
    default_head_dim: int | None = None,
    default_rotary_percent: float = 1.0,
    default_tied: bool = False,
    **traits: Any,
) -> ModelSpec:
    """A spec from a Llama-shaped `config.json`.

    Args:
        config: The data.
        family: Name of the family.
        activation_name: The one value of `activation_key` that the spec's activation goes by.
        activation_key: Where the activation stands.
        eps_key: Where the norms' epsilon stands.
        default_head_dim: What the class assumes where `head_dim` is absent; None: `hidden_size / num_attention_heads`.
        default_rotary_percent: What it assumes where `partial_rotary_factor` is absent.
        default_tied: What it assumes where `tie_word_embeddings` is absent.
        **traits: Fields of `ModelSpec` that the family sets; they take precedence.

    Raises:
        SpecError: A key is missing or a setting is not supported.
    """
    try:
        heads = config["num_attention_heads"]
        found = config.get(activation_key, activation_name)
        if found != activation_name:
            raise SpecError(f"config.json: {activation_key} = {found!r} is not supported", rule=activation_name)
        layer = LayerSpec(
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            ffn_hidden_size=config["intermediate_size"],
        )
        known: dict[str, Any] = {
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "head_dim": config.get("head_dim") or default_head_dim or config["hidden_size"] // heads,
            "layers": (layer,) * config["num_hidden_layers"],
            "max_position_embeddings": config["max_position_embeddings"],
            "norm_eps": config[eps_key],
            "tied_embeddings": bool(config.get("tie_word_embeddings", default_tied)),
        }
        if "rotary_base" not in traits:
            known |= _rotary(config, default_rotary_percent)
        return ModelSpec(family=family, **(known | traits))
    except KeyError as error:
        raise SpecError(f"config.json: key {error} is missing", rule=f"a {family} config has it") from error
    except TypeError as error:
        raise SpecError(f"config.json: a value is of the wrong kind ({error})") from error


def _rotary(config: Mapping[str, Any], default_percent: float) -> dict[str, Any]:
    """Rotary fields, from `rope_parameters` (transformers 5) or the older keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    percent = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return {
        "rotary_base": rope_base(rope, config.get("rope_theta")),
        "rotary_percent": float(default_percent if percent is None else percent),
        "rope_scaling": rope_scaling(rope),
    }


def rope_base(rope: Mapping[str, Any], otherwise: float | None) -> float:
    """Rotary base of one set of rotary parameters."""
    return float(rope.get("rope_theta") or otherwise or 10000.0)


def rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    """Rotary scaling of one set of rotary parameters.

    Raises:
        SpecError: A scaling other than Llama 3.1's.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise SpecError(f"config.json: rope_type = {kind!r} is not supported", rule="default or llama3")
    return RopeScaling(**{name: rope[name] for name in _SCALING_KEYS})


def write_common(
    spec: ModelSpec, *, model_type: str, architecture: str, activation: str = "silu", eps_key: str = "rms_norm_eps"
) -> dict[str, Any]:
    """`config.json` data.

    `head_dim` is always explicit, since a pruned model's is not `hidden_size / num_attention_heads`.

    Raises:
        SpecError: The layers differ in size.
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
        "hidden_act": activation,
        "max_position_embeddings": spec.max_position_embeddings,
        eps_key: spec.norm_eps,
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


def window_of(config: Mapping[str, Any], *, default: int | None) -> int | None:
    """The window of a model all of whose layers have one; None where no position is beyond it.

    Positions beyond `max_position_embeddings` are none of the model's. `default` is what the class assumes where
    `sliding_window` is absent, which null is not.
    """
    window = config.get("sliding_window", default)
    if window is None or window >= config.get("max_position_embeddings", 0):
        return None
    return int(window)


def refuse_indivisible(spec: ModelSpec, architecture: str) -> None:
    """Some classes demand that heads divide the hidden size, though nothing is computed from it.

    Raises:
        SpecError: They do not.
    """
    heads = spec.layer.num_attention_heads
    if spec.hidden_size % heads:
        raise SpecError(
            f"transformers refuses a {architecture} with hidden_size = {spec.hidden_size} and {heads} heads",
            rule="hidden_size is a multiple of num_attention_heads",
            remedy="choose another target.hidden_size",
        )
