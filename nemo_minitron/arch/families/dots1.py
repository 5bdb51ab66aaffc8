"""dots.llm1: Qwen3's attention and DeepSeek-V3's experts: sigmoid scores, a correction bias, a shared expert."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import (
    EXPERT_NAMES,
    LLAMA_LIKE_NAMES,
    QK_NORM_NAMES,
    Family,
    shared_expert_names,
)
from nemo_minitron.arch.families.common import read_common, shared_part, write_common
from nemo_minitron.arch.layer import Mlp, Moe, RouterScore
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX
from nemo_minitron.errors import SpecError

_NAMES = (
    LLAMA_LIKE_NAMES
    | QK_NORM_NAMES
    | EXPERT_NAMES
    | shared_expert_names("shared_experts")
    | {LAYER_PREFIX + "mlp.router.expert_bias": ("model.layers.{i}.mlp.gate.e_score_correction_bias",)}
)

# What Dots1Config assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 4608,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
    "max_window_layers": 62,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    _refuse(config)
    experts = Moe(
        num_experts=config["n_routed_experts"],
        expert_ffn_hidden_size=config["moe_intermediate_size"],
        top_k=config["num_experts_per_tok"],
        shared_ffn_hidden_size=(config["n_shared_experts"] or 0) * config["moe_intermediate_size"],
        score_function=RouterScore.SIGMOID,
        normalize_top_k=config["norm_topk_prob"],
        correction_bias=True,
        scaling_factor=config["routed_scaling_factor"],
        router_fp32=True,
    )
    dense, first = Mlp(ffn_hidden_size=config["intermediate_size"]), config["first_k_dense_replace"]
    return read_common(
        config, family="dots1", qk_norm=True, feed_forward=lambda index: dense if index < first else experts
    )


def _refuse(config: Mapping[str, Any]) -> None:
    """Settings that nothing here computes.

    Raises:
        SpecError: There is one.
    """
    for key in ("n_routed_experts", "num_experts_per_tok"):
        if config[key] is None:
            raise SpecError(f"config.json: key '{key}' is missing", rule="a dots1 config has it")
    if config["n_group"] not in (None, 1):
        raise SpecError(f"config.json: n_group = {config['n_group']} is not supported for dots1", rule="1")
    local = not config.get("layer_types") and config["num_hidden_layers"] > (config["max_window_layers"] or 0)
    if config["sliding_window"] is not None and local:
        raise SpecError(
            f"config.json: layers from max_window_layers = {config['max_window_layers']} have a sliding window",
            rule="none that dots1 is supported with",
        )


def _write(spec: ModelSpec) -> dict[str, Any]:
    experts = shared_part(spec, Moe)
    first = next(index for index, layer in enumerate(spec.layers) if layer.has_experts)
    if any(not layer.has_experts for layer in spec.layers[first:]):
        raise SpecError("a layer without experts follows one that has them", rule="Dots1ForCausalLM: only before them")
    count, rest = divmod(experts.shared_ffn_hidden_size, experts.expert_ffn_hidden_size)
    if rest or not count:
        raise SpecError(
            f"shared_ffn_hidden_size = {experts.shared_ffn_hidden_size} with expert_ffn_hidden_size = "
            f"{experts.expert_ffn_hidden_size}",
            rule="Dots1ForCausalLM: a shared expert is as large as some routed ones together",
            remedy="choose target.shared_ffn_hidden_size and target.expert_ffn_hidden_size so",
        )
    return write_common(spec, model_type="dots1", architecture="Dots1ForCausalLM") | {
        "moe_intermediate_size": experts.expert_ffn_hidden_size,
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": count,
        "num_experts_per_tok": experts.top_k,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": first,
        "scoring_func": "sigmoid",  # the class knows no other; llama.cpp asks
        "norm_topk_prob": experts.normalize_top_k,
        "routed_scaling_factor": experts.scaling_factor,
        "sliding_window": None,
        "attention_bias": False,
    }


DOTS1 = Family(
    name="dots1",
    hf_model_type="dots1",
    hf_architecture="Dots1ForCausalLM",
    hf_names=_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=("sliding_window", "n_routed_experts"),
    fixed={"qk_norm": True},
    free=("tied_embeddings", "rope_scaling"),
    experts={"score_function": RouterScore.SIGMOID, "correction_bias": True, "router_fp32": True},
    free_experts=("normalize_top_k", "scaling_factor", "shared_ffn_hidden_size"),
    has_dense_layers=True,
)
