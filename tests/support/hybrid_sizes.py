"""Published sizes of Nemotron-H and Nemotron Nano 2, and their parameters counted by hand."""

from typing import Any

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
}
"""Configurations of the models' pages on the Hugging Face hub, and their totals there, to three digits."""


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
    attention = hidden + hidden * (queries + 2 * 8 * 128) + queries * hidden
    mlp = hidden + 2 * hidden * config["intermediate_size"]
    each = {"M": mamba, "*": attention, "-": mlp}
    return sum(each[letter] for letter in pattern) + 2 * 131_072 * hidden + hidden
