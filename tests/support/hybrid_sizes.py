"""Published sizes of Nemotron-H, Nemotron Nano 2 and Nemotron 3 Nano, and their parameters counted by hand."""

from typing import Any

THREE = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
EIGHT = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
PUBLISHED: dict[str, dict[str, Any]] = {
    "Nemotron-H 8B": {
        "hybrid_override_pattern": EIGHT,
        "hidden_size": 4096,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "total": 8.10e9,
    },
    "Nemotron-H 4B": {
        "hybrid_override_pattern": EIGHT,
        "hidden_size": 3072,
        "intermediate_size": 12_288,
        "num_attention_heads": 32,
        "mamba_num_heads": 112,
        "mamba_head_dim": 64,
        "total": 4.49e9,
    },
    "Nano 2 12B": {
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        "hidden_size": 5120,
        "intermediate_size": 20_480,
        "num_attention_heads": 40,
        "mamba_num_heads": 128,
        "mamba_head_dim": 80,
        "total": 12.31e9,
    },
    "Nano 2 9B": {
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        "hidden_size": 4480,
        "intermediate_size": 15_680,
        "num_attention_heads": 40,
        "mamba_num_heads": 128,
        "mamba_head_dim": 80,
        "total": 8.89e9,
    },
    "Nemotron 3 Nano 30B": {
        "hybrid_override_pattern": THREE,
        "hidden_size": 2688,
        "intermediate_size": 1856,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "total": 31.58e9,
    },
}
PUBLISHED["Nemotron 3 Nano 22B"] = PUBLISHED["Nemotron 3 Nano 30B"] | {
    "hidden_size": 2304,
    "n_routed_experts": 104,
    "moe_shared_expert_intermediate_size": 3072,
    "total": 22.28e9,
}
"""Configurations of the models' pages on the Hugging Face hub, and their totals there, to three digits or more; the
last one is the student of Model Optimizer's tutorial (examples/megatron_bridge/tutorials), as are both totals."""
ACTIVE = {"Nemotron 3 Nano 30B": 3.58e9, "Nemotron 3 Nano 22B": 3.00e9}
"""Of those parameters, what one token passes through, as that tutorial counts, embedding and output layer included. The
model's page says 3.2B without the embedding, which is looked up, and 3.6B with it."""


def published(name: str) -> dict[str, Any]:
    return {
        "model_type": "nemotron_h",
        "vocab_size": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_groups": 8,
        "ssm_state_size": 128,
        "max_position_embeddings": 8192,
        "time_step_limit": [0.0, float("inf")],
        **{key: value for key, value in PUBLISHED[name].items() if key != "total"},
    }


def by_hand(config: dict[str, Any]) -> int:
    """Parameters of each kind of layer, each with its norm, written out."""
    hidden, pattern = config["hidden_size"], config["hybrid_override_pattern"]
    inner, heads = config["mamba_num_heads"] * config["mamba_head_dim"], config["mamba_num_heads"]
    maps = 2 * 8 * 128
    mamba = hidden + hidden * (2 * inner + maps + heads) + 5 * (inner + maps) + 3 * heads + inner + inner * hidden
    queries = config["num_attention_heads"] * 128
    attention = hidden + hidden * (queries + 2 * config["num_key_value_heads"] * 128) + queries * hidden
    mlp = hidden + 2 * hidden * config["intermediate_size"]
    each = {"M": mamba, "*": attention, "-": mlp, "E": _experts(config, config.get("n_routed_experts", 0))}
    return sum(each[letter] for letter in pattern) + 2 * 131_072 * hidden + hidden


def active_by_hand(config: dict[str, Any]) -> int:
    """The same with the experts of one token in the place of all."""
    unused = config["n_routed_experts"] - config["num_experts_per_tok"]
    each = _experts(config, unused) - _experts(config, 0)
    return by_hand(config) - config["hybrid_override_pattern"].count("E") * each


def _experts(config: dict[str, Any], count: int) -> int:
    """A layer of experts of which `count` are routed to: norm, router, correction bias, shared expert, experts."""
    if "n_routed_experts" not in config:
        return 0
    hidden, total = config["hidden_size"], config["n_routed_experts"]
    shared = 2 * hidden * config["moe_shared_expert_intermediate_size"]
    return hidden + total * hidden + total + shared + count * 2 * hidden * config["moe_intermediate_size"]
