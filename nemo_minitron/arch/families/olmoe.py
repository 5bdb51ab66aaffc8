"""OLMoE: experts in every layer, and norms over all queries and over all keys of a token, not over each head."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import EXPERT_NAMES, LLAMA_LIKE_NAMES, QK_NORM_NAMES, Family
from nemo_minitron.arch.families.common import read_common, shared_part, write_common
from nemo_minitron.arch.families.sparse_layers import number_of_experts
from nemo_minitron.arch.layer import Attention, Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

# What OlmoeConfig assumes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "bos_token_id": None,
    "eos_token_id": 50_279,
    "pad_token_id": 1,
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    experts = Moe(
        num_experts=number_of_experts(config, 64),
        expert_ffn_hidden_size=config["intermediate_size"],
        top_k=config["num_experts_per_tok"],
        normalize_top_k=config["norm_topk_prob"],
    )
    spec = read_common(config, family="olmoe", feed_forward=lambda _: experts, qk_norm=True, full_width_qk_norm=True)
    _check_width(spec, "config.json: ", "")
    return spec


def _check_width(spec: ModelSpec, where: str, remedy: str) -> None:
    """The class gives the norm of its queries `hidden_size` channels, however many they are.

    Raises:
        SpecError: They are not as many.
    """
    heads = shared_part(spec, Attention).num_attention_heads
    if spec.hidden_size != heads * spec.head_dim:
        raise SpecError(
            f"{where}hidden_size = {spec.hidden_size} with {heads} heads of {spec.head_dim} channels",
            rule="OlmoeForCausalLM: hidden_size is the number of heads times their channels, since the norm of its "
            "queries is that wide",
            remedy=remedy,
        )


def _write(spec: ModelSpec) -> dict[str, Any]:
    experts = shared_part(spec, Moe)
    _check_width(
        spec,
        "",
        "choose target.hidden_size and target.num_attention_heads (with target.num_query_groups) so, or export to "
        "nemo, nemo2 or megatron",
    )
    return write_common(spec, model_type="olmoe", architecture="OlmoeForCausalLM") | {
        "intermediate_size": experts.expert_ffn_hidden_size,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.normalize_top_k,
        "clip_qkv": None,
        "attention_bias": False,
        "output_router_logits": False,
    }


OLMOE = Family(
    name="olmoe",
    hf_model_type="olmoe",
    hf_architecture="OlmoeForCausalLM",
    hf_names=LLAMA_LIKE_NAMES | QK_NORM_NAMES | EXPERT_NAMES,
    read=_read,
    defaults=_DEFAULTS,
    write=_write,
    settings=("num_experts", "num_local_experts"),
    fixed={"qk_norm": True, "full_width_qk_norm": True},
    free=("tied_embeddings", "rope_scaling"),
    experts={},
    free_experts=("normalize_top_k",),
    holds=lambda spec, sizes: sizes["num_attention_heads"] * spec.head_dim == sizes["hidden_size"],
)
