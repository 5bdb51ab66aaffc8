"""Reading and writing the keys of `config.json` that every family shares."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from nemo_minitron.arch.families.rope import BASE, read_rope, scaling_data
from nemo_minitron.arch.layer import Attention, FeedForward, Mlp, Moe, layers_of, transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

_Part = TypeVar("_Part", Attention, Mlp, Moe)


def read_common(
    config: Mapping[str, Any],
    *,
    family: str,
    activation_name: str = "silu",
    activation_key: str = "hidden_act",
    eps_key: str = "rms_norm_eps",
    rotary_percent: float = 1.0,
    rotary_base_assumed: float = BASE,
    feed_forward: Callable[[int], FeedForward] | None = None,
    **traits: Any,
) -> ModelSpec:
    """A spec from a Llama-shaped `config.json`.

    Args:
        config: The data, complete with the defaults of the class.
        family: Name of the family, for messages.
        activation_name: The one value of `activation_key` that the spec's activation goes by.
        activation_key: Where the activation stands.
        eps_key: Where the norms' epsilon stands.
        rotary_percent: What the class assumes where `partial_rotary_factor` is absent.
        rotary_base_assumed: What it assumes where `rope_theta` is absent.
        feed_forward: That of a layer, by its number; None for an MLP of `intermediate_size` in all of them.
        **traits: Fields of `ModelSpec` that the family sets; they take precedence.

    Raises:
        SpecError: A key is missing or a setting is not supported.
    """
    try:
        heads = config["num_attention_heads"]
        if (found := config[activation_key]) != activation_name:
            raise SpecError(f"config.json: {activation_key} = {found!r} is not supported", rule=activation_name)
        groups, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
        layer = transformer_layer(
            num_attention_heads=heads,
            num_query_groups=heads if groups is None else groups,
            ffn_hidden_size=1 if feed_forward else config["intermediate_size"],
        )
        known: dict[str, Any] = {
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "head_dim": config["hidden_size"] // heads if head_dim is None else head_dim,
            "layers": layers_of(layer, config["num_hidden_layers"], feed_forward),
            "max_position_embeddings": config["max_position_embeddings"],
            "norm_eps": config[eps_key],
            "tied_embeddings": config["tie_word_embeddings"],
        }
        if "rotary_base" not in traits:
            rope = read_rope(config, percent=rotary_percent, base=rotary_base_assumed)
            known |= {"rotary_base": rope.base, "rotary_percent": rope.percent, "rope_scaling": rope.scaling}
        return ModelSpec(**(known | traits))
    except KeyError as error:
        raise SpecError(f"config.json: key {error} is missing", rule=f"a {family} config has it") from error
    except TypeError as error:
        raise SpecError(f"config.json: a value is of the wrong kind ({error})") from error


def write_common(
    spec: ModelSpec, *, model_type: str, architecture: str, activation: str = "silu", eps_key: str = "rms_norm_eps"
) -> dict[str, Any]:
    """`config.json` data.

    `head_dim` is always explicit, since a pruned model's is not `hidden_size / num_attention_heads`. In a model with
    experts, `intermediate_size` is that of the layers without, or else of all experts that a token passes through.

    Raises:
        SpecError: The layers differ in size, or one lacks a part.
    """
    attention, dense = shared_part(spec, Attention), shared_part(spec, Mlp) if not _all_have_experts(spec) else None
    if dense is None:
        experts = spec.layers[0].moe
        neurons = experts.expert_ffn_hidden_size * experts.top_k
    else:
        neurons = dense.ffn_hidden_size
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rotary_base}
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": neurons,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_query_groups,
        "head_dim": spec.head_dim,
        "hidden_act": activation,
        "max_position_embeddings": spec.max_position_embeddings,
        eps_key: spec.norm_eps,
        "rope_theta": spec.rotary_base,
        "tie_word_embeddings": spec.tied_embeddings,
        "attention_dropout": 0.0,
    }
    if (scaling := scaling_data(spec)) is not None:
        config["rope_scaling"] = scaling
        rope = {**scaling, "rope_theta": spec.rotary_base}
    config["rope_parameters"] = rope
    return config


def shared_part(spec: ModelSpec, kind: type[_Part]) -> _Part:
    """The part of a kind of which all layers that have one have the same.

    Raises:
        SpecError: They differ, no layer has one, or a layer lacks a mixer or a feed-forward.
    """
    if not spec.has_experts:
        return spec.layer.part(kind)
    if any(len(layer.parts) < 2 for layer in spec.layers):
        raise SpecError("a layer lacks a mixer or a feed-forward", rule="this step needs both in every layer")
    parts = {part for layer in spec.layers if (part := layer.find(kind)) is not None}
    if len(parts) != 1:
        raise SpecError(
            f"the model's layers differ in {kind.__name__.lower()}",
            rule="this step needs layers of one size, and experts that are routed to in one way",
        )
    return parts.pop()


def _all_have_experts(spec: ModelSpec) -> bool:
    return all(layer.has_experts for layer in spec.layers)


def window_of(config: Mapping[str, Any]) -> int | None:
    """The window of a model all of whose layers have one; None where no position is beyond it.

    Positions beyond `max_position_embeddings` are none of the model's.

    Raises:
        SpecError: It is not a size.
    """
    window = config["sliding_window"]
    if window is None:
        return None
    if type(window) is not int or window < 1:
        raise SpecError(f"config.json: sliding_window = {str(window)[:40]!r}", rule="a whole number from 1, or null")
    return None if window >= config["max_position_embeddings"] else window


def refuse_indivisible(spec: ModelSpec, architecture: str) -> None:
    """Some classes demand that heads divide the hidden size, though nothing is computed from it.

    Raises:
        SpecError: They do not.
    """
    heads = shared_part(spec, Attention).num_attention_heads
    if spec.hidden_size % heads:
        raise SpecError(
            f"transformers refuses a {architecture} with hidden_size = {spec.hidden_size} and {heads} heads",
            rule="hidden_size is a multiple of num_attention_heads",
            remedy="choose another target.hidden_size",
        )
