"""Which layers of Qwen's mixtures have experts: keys of `config.json` that both of its families share."""

from collections.abc import Callable, Mapping
from typing import Any

from nemo_minitron.arch.families.common import shared_part
from nemo_minitron.arch.layer import FeedForward, Mlp, Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

SPARSE_DEFAULTS: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
"""Keys and their defaults; a family puts its own in their place."""


def number_of_experts(config: Mapping[str, Any], default: int) -> int:
    """Experts of a layer: `num_experts` of published models, or `num_local_experts`, which transformers 5 writes.

    Raises:
        SpecError: Both are there and differ, or the number is none.
    """
    found = {key: config[key] for key in ("num_experts", "num_local_experts") if key in config}
    if len(set(map(str, found.values()))) > 1:
        raise SpecError(
            f"config.json: num_experts = {found['num_experts']}, but num_local_experts = {found['num_local_experts']}",
            rule="both are the number of experts of a layer",
            remedy="keep the one that is meant",
        )
    count = next(iter(found.values()), default)
    if type(count) is not int or count < 1:
        raise SpecError(f"config.json: {next(iter(found))} = {str(count)[:40]!r}", rule="a whole number from 1")
    return count


def qwen_feed_forwards(config: Mapping[str, Any], experts: Moe) -> Callable[[int], FeedForward]:
    """The feed-forward of a layer by its number: every `decoder_sparse_step`-th has experts unless it is named.

    Raises:
        SpecError: A key is of the wrong kind.
    """
    step, named = config["decoder_sparse_step"], config["mlp_only_layers"] or []
    if type(step) is not int or step < 1:
        raise SpecError(f"config.json: decoder_sparse_step = {str(step)[:40]!r}", rule="a whole number from 1")
    if not isinstance(named, list) or not all(type(index) is int for index in named):
        raise SpecError(f"config.json: mlp_only_layers = {str(named)[:40]!r}", rule="a list of numbers of layers")
    dense = Mlp(ffn_hidden_size=config["intermediate_size"])
    return lambda index: dense if index in named or (index + 1) % step else experts


def write_sparse_layers(spec: ModelSpec) -> dict[str, Any]:
    """The keys of experts that both families share.

    Raises:
        SpecError: Layers have experts of different sizes.
    """
    experts = shared_part(spec, Moe)
    return {
        "moe_intermediate_size": experts.expert_ffn_hidden_size,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.normalize_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, layer in enumerate(spec.layers) if not layer.has_experts],
        "output_router_logits": False,
        "use_sliding_window": False,
    }
