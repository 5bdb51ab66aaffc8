"""Experts of Nemotron 3 in the keys of NemotronHConfig, and back: squared ReLU, sigmoid scores, a shared expert."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.keys import complete
from nemo_minitron.arch.layer import Moe, RouterScore
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

_ARCHITECTURE = "NemotronHForCausalLM"
_MIN_EXPERTS = 2
"""The class looks for the two best experts of a group, of which there is one."""
TRAITS: dict[str, Any] = {"score_function": RouterScore.SIGMOID, "correction_bias": True, "router_fp32": True}
"""What the class always computes."""
FREE_TRAITS = ("normalize_top_k", "scaling_factor", "shared_ffn_hidden_size")
"""What its configuration decides."""

_SIZES = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size")
# What NemotronHConfig assumes.
DEFAULTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "moe_latent_size": None,
}
# Settings of which one value only is computed. The class overlooks n_shared_experts, and others do not.
_ONLY: dict[str, tuple[Any, str]] = {
    "n_shared_experts": (1, "one shared expert, of moe_shared_expert_intermediate_size neurons"),
    "n_group": (1, "experts in one group"),
    "topk_group": (1, "experts in one group"),
    "moe_latent_size": (None, "experts that read the hidden state itself"),
}
SETTINGS = (*DEFAULTS, "moe_shared_expert_overlap")
"""Keys of experts; the last is about speed alone."""


def read_experts(config: Mapping[str, Any]) -> Moe:
    """The experts that a `config.json` describes.

    Raises:
        SpecError: A size is missing, or a setting is not supported; names it.
    """
    if missing := [key for key in _SIZES if key not in config]:
        raise SpecError(
            f"config.json: {missing[0]} is missing, and there are layers of experts",
            rule=f"every size is written out; the class would assume {DEFAULTS[missing[0]]}",
        )
    found = complete(config, DEFAULTS, (), family=_ARCHITECTURE)
    for key, (allowed, words) in _ONLY.items():
        if found[key] != allowed:
            raise SpecError(f"config.json: {key} = {str(found[key])[:40]} is not supported", rule=words)
    if found["moe_shared_expert_intermediate_size"] < 1:
        raise SpecError(
            f"config.json: moe_shared_expert_intermediate_size = {found['moe_shared_expert_intermediate_size']}",
            rule=f"{_ARCHITECTURE} has a shared expert in every layer of experts",
        )
    _check_count(found["n_routed_experts"])
    return Moe(
        num_experts=found["n_routed_experts"],
        expert_ffn_hidden_size=found["moe_intermediate_size"],
        top_k=found["num_experts_per_tok"],
        shared_ffn_hidden_size=found["moe_shared_expert_intermediate_size"],
        normalize_top_k=found["norm_topk_prob"],
        scaling_factor=float(found["routed_scaling_factor"]),
        **TRAITS,
    )


def write_experts(spec: ModelSpec) -> dict[str, Any]:
    """The keys of experts; {} for a model without.

    Raises:
        SpecError: Layers have different experts, or such that the class cannot be told.
    """
    found = {layer.moe for layer in spec.layers if layer.has_experts}
    if not found:
        return {}
    if len(found) > 1:
        raise SpecError("the model's layers differ in their experts", rule="NemotronHConfig has one kind of experts")
    experts = found.pop()
    if not experts.shared_ffn_hidden_size:
        raise SpecError("experts without a shared one", rule=f"{_ARCHITECTURE} has one in every layer of experts")
    _check_count(experts.num_experts)
    return {
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "n_shared_experts": 1,
        "norm_topk_prob": experts.normalize_top_k,
        "routed_scaling_factor": experts.scaling_factor,
        "n_group": 1,
        "topk_group": 1,
    }


def _check_count(experts: int) -> None:
    if experts < _MIN_EXPERTS:
        raise SpecError(f"num_experts = {experts}", rule=f"{_ARCHITECTURE} routes among {_MIN_EXPERTS} or more")
