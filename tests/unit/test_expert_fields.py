"""Experts in Megatron's words: what is read computes what Megatron's router computes; what it cannot is not written."""

import itertools
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from nemo_minitron.arch.expert_fields import are_alike, expert_fields, feed_forwards
from nemo_minitron.arch.layer import Attention, LayerSpec, Moe, RouterScore
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.megatron.engine_experts import goes_to_all
from nemo_minitron.ops.routing import route
from tests.parallel.megatron_jobs import EXPERT_SPECS

KINDS = list(itertools.product(("softmax", "sigmoid"), (1, 3), (False, True)))


@pytest.mark.parametrize(("score", "top_k", "before"), [kind for kind in KINDS if kind != ("softmax", 1, False)])
def test_what_is_read_routes_as_megatron_does(score: str, top_k: int, before: bool) -> None:
    """Softmax `before` the choice or behind it; of one expert Megatron refuses the latter."""
    fields = {"num_moe_experts": 7, "moe_ffn_hidden_size": 4, "ffn_hidden_size": 4, "moe_router_topk": top_k}
    fields |= {"moe_router_score_function": score, "moe_router_pre_softmax": before}
    layers = feed_forwards(fields, where="test")
    assert layers is not None
    moe = layers(0)
    assert isinstance(moe, Moe)
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    expected, _ = topk_routing_with_score_function(logits, top_k, use_pre_softmax=before, score_function=score)
    sigmoid = moe.score_function is RouterScore.SIGMOID
    found = route(logits, top_k=moe.top_k, sigmoid=sigmoid, normalize=moe.normalize_top_k)
    torch.testing.assert_close(found.weights, expected)


@pytest.mark.parametrize(("score", "top_k", "normalized"), KINDS)
def test_what_is_written_is_read_the_same_or_is_not_written(score: str, top_k: int, normalized: bool) -> None:
    moe = Moe(num_experts=4, expert_ffn_hidden_size=8, top_k=top_k, score_function=score, normalize_top_k=normalized)
    layer = LayerSpec(mixer=Attention(num_attention_heads=4, num_query_groups=2), feed_forward=moe)
    spec: ModelSpec = replace(EXPERT_SPECS["experts"], layers=(layer,) * 2)
    fields = {name: value for name, value in expert_fields(spec).items() if value is not None}
    read = feed_forwards(fields, where="test")
    assert read is not None
    of_one = score == "softmax" and top_k == 1 and normalized  # which Megatron refuses
    assert are_alike(spec) is (read(0) == moe and not of_one)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 8, 12])
def test_tokens_take_the_way_that_is_less_to_send(top_k: int, ranks: int) -> None:
    """Bytes of a token and channel in bf16: to all ranks and back in fp32, or to each expert and back."""
    to_all, to_experts = (ranks - 1) * (2 + 4), top_k * (ranks - 1) / ranks * (2 + 2)
    assert goes_to_all(top_k, ranks) is (to_all <= to_experts)
