"""Experts in the words of Megatron-Core, NeMo 2, Megatron-Bridge and Megatron-LM, and back. Plain data.

Their names are fields of `TransformerConfig`; Megatron-LM's command line has the same but for the number of experts.
"""

from collections.abc import Callable, Mapping
from typing import Any

from nemo_minitron.arch.layer import FeedForward, Mlp, Moe, RouterScore
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

FIELD, ARGUMENT = "num_moe_experts", "num_experts"
"""Where the number of experts stands: in a configuration, and in Megatron-LM's arguments."""

# Settings that change what experts compute and have no counterpart in a spec, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("moe_router_num_groups", "moe_router_group_topk"), (1,)),
    "moe_router_topk_limited_devices": (),
    **dict.fromkeys(("moe_latent_size", "moe_input_jitter_eps", "moe_apply_probs_on_input"), ()),
    **dict.fromkeys(("moe_expert_capacity_factor", "moe_router_force_load_balancing"), ()),
    "moe_router_load_balancing_type": ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
}


def expert_fields(spec: ModelSpec, *, args: bool = False) -> dict[str, Any]:
    """Fields of a model with experts, or arguments of Megatron-LM; {} for a model without.

    `ffn_hidden_size` is that of the layers without experts, or of one expert where there are none.
    """
    found = next((layer.moe for layer in spec.layers if layer.has_experts), None)
    if found is None:
        return {}
    dense = next((layer.mlp for layer in spec.layers if isinstance(layer.feed_forward, Mlp)), None)
    sparse = [int(layer.has_experts) for layer in spec.layers]
    softmax = found.score_function is RouterScore.SOFTMAX
    return {
        "ffn_hidden_size": found.expert_ffn_hidden_size if dense is None else dense.ffn_hidden_size,
        ARGUMENT if args else FIELD: found.num_experts,
        "moe_ffn_hidden_size": found.expert_ffn_hidden_size,
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_router_topk": found.top_k,
        "moe_router_score_function": found.score_function.value,
        "moe_router_pre_softmax": softmax and not found.normalize_top_k,
        "moe_router_topk_scaling_factor": None if found.scaling_factor == 1 else found.scaling_factor,
        "moe_router_enable_expert_bias": found.correction_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_dtype": "fp32" if found.router_fp32 else None,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_shared_expert_intermediate_size": found.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": found.shared_gate,
        "moe_token_dispatcher_type": "alltoall",
    }


def are_alike(spec: ModelSpec) -> bool:
    """Whether one set of fields describes the experts of all layers, and Megatron can compute them.

    It normalises the sigmoid scores of several experts and never that of one, wants the softmax of one before the
    choice, and knows a correction bias of sigmoid scores alone.
    """
    kinds = {layer.feed_forward for layer in spec.layers}
    experts = [kind for kind in kinds if isinstance(kind, Moe)]
    dense = [kind for kind in kinds if isinstance(kind, Mlp)]
    sigmoid = all(each.score_function is RouterScore.SIGMOID for each in experts)
    several = all(each.top_k > 1 for each in experts)
    normalized = {each.normalize_top_k for each in experts}
    computes = (
        normalized == {several}
        if sigmoid
        else (several or normalized == {False}) and not any(each.correction_bias for each in experts)
    )
    return len(experts) == 1 and len(dense) == len(kinds) - 1 <= 1 and computes


def feed_forwards(found: Mapping[str, Any], *, where: str) -> Callable[[int], FeedForward] | None:
    """The feed-forward of a layer by its number; None for a model without experts.

    Args:
        found: Fields or arguments, without those that are null.
        where: For messages.

    Raises:
        SpecError: A setting is not supported, or is no number.
    """
    experts = experts_in(found, where=where)
    if experts is None:
        return None
    dense = Mlp(ffn_hidden_size=found["ffn_hidden_size"])
    frequency = found.get("moe_layer_freq", 1)
    if isinstance(frequency, int) and frequency > 0:
        return lambda index: experts if index % frequency == 0 else dense
    if isinstance(frequency, list | tuple) and all(value in (0, 1) for value in frequency):
        if len(frequency) != found.get("num_layers", len(frequency)):
            raise SpecError(
                f"{where}: moe_layer_freq names {len(frequency)} layers, num_layers = {found['num_layers']}",
                rule="one 0 or 1 for each layer",
            )
        return lambda index: experts if frequency[index] else dense
    raise SpecError(f"{where}: moe_layer_freq = {str(frequency)[:60]!r}", rule="a number, or a list of 0 and 1")


def experts_in(found: Mapping[str, Any], *, where: str) -> Moe | None:
    """The experts that layers have, whichever do; None for a model without. See `feed_forwards`."""
    count = found.get(FIELD, found.get(ARGUMENT))
    if not count:
        return None
    for name, neutral in _NEUTRAL.items():
        if (value := found.get(name)) and value not in neutral:
            raise SpecError(f"{where}: {name} = {str(value)[:60]!r} is not supported", rule="absent")
    sizes = {
        "num_experts": count,
        "expert_ffn_hidden_size": found.get("moe_ffn_hidden_size", found.get("ffn_hidden_size")),
        "top_k": found.get("moe_router_topk", 2),
        "shared_ffn_hidden_size": found.get("moe_shared_expert_intermediate_size", 0),
    }
    if wrong := [name for name, value in sizes.items() if type(value) is not int]:
        raise SpecError(f"{where}: {wrong[0]} = {str(sizes[wrong[0]])[:40]!r}", rule="a whole number")
    name = found.get("moe_router_score_function", RouterScore.SOFTMAX.value)
    if name not in tuple(RouterScore):
        raise SpecError(
            f"{where}: moe_router_score_function = {str(name)[:40]!r} is not supported", rule=" or ".join(RouterScore)
        )
    sigmoid = name == RouterScore.SIGMOID
    return Moe(
        **sizes,
        shared_gate=bool(found.get("moe_shared_expert_gate", False)),
        score_function=RouterScore(name),
        normalize_top_k=sizes["top_k"] > 1 if sigmoid else not found.get("moe_router_pre_softmax", False),
        correction_bias=bool(found.get("moe_router_enable_expert_bias", False)),
        scaling_factor=float(found.get("moe_router_topk_scaling_factor", 1.0)),
        router_fp32=found.get("moe_router_dtype") == "fp32",
    )
