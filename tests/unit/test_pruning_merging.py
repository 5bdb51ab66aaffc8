"""Head-residual merging: the paper's formula on query, key and value matrices one by one, in float64 and in lists."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.source import Checkpoint
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import PlanError
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.mixes import composed, residual_mixes
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores
from tests import tiny
from tests.support.plans import layer_plan
from tests.support.scores import sums

SIZE = 8


def scores_of(spec: ModelSpec, heads: list[float]) -> Scores:
    """Scores whose heads have the given importance in every layer."""
    found, _ = sums(spec, samples=1)
    for layer in range(spec.num_layers):
        vector = torch.tensor(heads).double().repeat_interleave(spec.head_dim)
        for kind in ("mean", "l2"):
            found[f"layers.{layer}.head.{kind}.sum"], found[f"layers.{layer}.head.{kind}.sumsq"] = vector, vector**2
    return Scores(spec, found)


def plan_of(source: Checkpoint, heads: list[float], **target: Any) -> PruningPlan:
    return build_plan(scores_of(source.spec, heads), TargetConfig(**target, merge_head_residuals=True), source.spec)


def paper(matrix: torch.Tensor, ranking: list[int], keep: int) -> dict[int, torch.Tensor]:
    """Rows of each kept head after merging, with the paper's own indices: heads counted from 1, best first."""
    head = {i + 1: matrix[unit * SIZE : (unit + 1) * SIZE].double() for i, unit in enumerate(ranking)}
    L, K = len(ranking), keep
    new = {}
    for i in range(1, K + 1):
        partner = 2 * K - i + 1
        in_interval = K - (L - K) <= i <= K
        new[ranking[i - 1]] = head[i] + (head[i] - head[partner]) if in_interval and partner in head else head[i]
    return new


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_grouped_queries_merge_query_weights_inside_each_group(tmp_path: Path, keep: int) -> None:
    tiny.write_qwen2(tmp_path / "teacher", num_attention_heads=8, num_key_value_heads=2)
    source = open_hf(tmp_path / "teacher")
    importance = [3.0, 9.0, 1.0, 5.0, 2.0, 8.0, 7.0, 4.0]
    rankings = {0: [1, 3, 0, 2], 1: [5, 6, 7, 4]}
    plan = plan_of(source, importance, num_attention_heads=2 * keep)
    write_hf(PrunedSource(source, plan), tmp_path / "student")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn."
        for part in ("q_proj.weight", "q_proj.bias"):
            rows = [paper(before[name + part], rankings[group], keep) for group in (0, 1)]
            expected = torch.cat([new[unit] for new in rows for unit in sorted(new)])
            assert torch.equal(after[name + part], expected.float()), part
        for part in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            assert torch.equal(after[name + part], before[name + part])
        kept = [
            unit * SIZE + channel
            for group in (0, 1)
            for unit in sorted(rankings[group][:keep])
            for channel in range(SIZE)
        ]
        assert torch.equal(after[name + "o_proj.weight"], before[name + "o_proj.weight"][:, kept])
    if keep == 4:
        assert plan.is_identity


def test_heads_with_their_own_key_and_value_merge_those_too(tmp_path: Path) -> None:
    tiny.write_llama(tmp_path / "teacher", num_attention_heads=8, num_key_value_heads=8, tied=False)
    source = open_hf(tmp_path / "teacher")
    ranking = [6, 1, 4, 0, 7, 2, 5, 3]
    importance = [0.0] * 8
    for place, unit in enumerate(ranking):
        importance[unit] = 10.0 - place
    plan = plan_of(source, importance, num_query_groups=5, hidden_size=40)
    write_hf(PrunedSource(source, plan), tmp_path / "student")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    name = "model.layers.2.self_attn."
    for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
        new = paper(before[name + part], ranking, 5)
        expected = torch.cat([new[unit] for unit in sorted(new)])[:, list(plan.hidden)]
        assert torch.equal(after[name + part], expected.float()), part


def test_dropped_groups_leave_nothing_behind() -> None:
    """Their queries have no key left to meet."""
    spec = ModelSpec(
        vocab_size=16,
        hidden_size=6,
        head_dim=2,
        layers=(transformer_layer(num_attention_heads=6, num_query_groups=3, ffn_hidden_size=5),),
        max_position_embeddings=8,
    )
    target = TargetConfig(num_query_groups=2, merge_head_residuals=True)
    plan = build_plan(scores_of(spec, [1, 2, 3, 4, 5, 6]), target, spec)
    assert plan.layers[0].kept[Axis.KV_GROUP] == (1, 2)
    assert not plan.merges


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    tiny.write_llama(tmp_path, num_attention_heads=8, num_key_value_heads=2)
    source = open_hf(tmp_path)
    scores = scores_of(source.spec, [3, 9, 1, 5, 2, 8, 7, 4])
    plain = build_plan(scores, TargetConfig(num_attention_heads=4), source.spec)
    merging = build_plan(scores, TargetConfig(num_attention_heads=4, merge_head_residuals=True), source.spec)
    assert not plain.merges
    assert merging.merges
    assert merging.digest() != plain.digest()
    assert merging.student == plain.student


# -- as data ----------------------------------------------------------------------------------------------------------


def test_ranks_and_partners() -> None:
    # L = 5, K = 3: i = 2 takes on 5, i = 3 takes on 4, i = 1 would take on 6, which does not exist.
    assert residual_mixes([40, 10, 20, 30, 0], keep=3) == ((10, ((0, -1), (10, 2))), (20, ((20, 2), (30, -1))))
    assert residual_mixes([2, 1, 0], keep=1) == ((2, ((1, -1), (2, 2))),)  # only as many as there are kept ones
    assert residual_mixes([2, 1, 0], keep=3) == ()


def test_plans_with_merges_are_a_format_of_their_own_and_old_ones_load(tmp_path: Path) -> None:
    layer = layer_plan(source=0, kv_groups=(0,), heads=(0, 2), ffn=(0,), merged_heads=((2, ((1, -1), (2, 2))),))
    spec = ModelSpec(
        vocab_size=4,
        hidden_size=2,
        head_dim=2,
        layers=(transformer_layer(num_attention_heads=3, num_query_groups=1, ffn_hidden_size=1),),
        max_position_embeddings=8,
    )
    plan = PruningPlan(spec=spec, hidden=(0, 1), layers=(layer,))
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["version"] == 2
    assert data["layers"][0]["merged_heads"] == {"2": {"1": -1, "2": 2}}
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    plain = replace(plan, layers=(replace(layer, mixes={}),))
    assert plain.to_dict()["version"] == 1
    assert set(plain.to_dict()["layers"][0]) == {"source", "kv_groups", "heads", "ffn"}
    for broken in ({"2": {"1": -0.5}}, {"2": {"x": 1}}, {"-2": {"1": 1}}, {"2": 3}, [2]):
        data["layers"][0]["merged_heads"] = broken
        with pytest.raises(PlanError):
            PruningPlan.from_dict(data)


def test_a_plan_s_digest_is_that_of_its_decision_as_sorted_json() -> None:
    """Students name the plan they come from by it."""
    spec = ModelSpec(
        vocab_size=4,
        hidden_size=2,
        head_dim=2,
        layers=(transformer_layer(num_attention_heads=1, num_query_groups=1, ffn_hidden_size=1),),
        max_position_embeddings=8,
    )
    decision = (
        '{"format":"nemo_minitron.plan","hidden":"0-1","layers":[{"ffn":"0","heads":"0","kv_groups":"0","source":0}],'
        '"rescale_norms":true,"spec":{"activation":"swiglu","head_dim":2,"hidden_size":2,"layers":{"count":1,'
        '"ffn_hidden_size":1,"num_attention_heads":1,"num_query_groups":1},"linear_bias":false,'
        '"max_position_embeddings":8,"norm":"rmsnorm","norm_eps":1e-05,"qk_norm":false,"qkv_bias":false,'
        '"rope_scaling":null,"rotary_base":10000.0,"rotary_percent":1.0,"tied_embeddings":false,"vocab_size":4},'
        '"version":1}'
    )
    assert PruningPlan.keep_all(spec).digest() == hashlib.sha256(decision.encode()).hexdigest()


# -- composition ------------------------------------------------------------------------------------------------------


def matrix_of(mixes: Any, kept: list[int], size: int) -> torch.Tensor:
    """The linear map from `size` units to the kept ones, as a dense integer matrix."""
    found = torch.zeros(len(kept), size, dtype=torch.int64)
    for row, unit in enumerate(kept):
        for origin, coefficient in dict(mixes).get(unit, ((unit, 1),)):
            found[row, origin] = coefficient
    return found


@pytest.mark.parametrize("seed", range(5))
def test_composed_mixes_are_products_of_matrices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first_order = torch.randperm(12, generator=generator).tolist()
    then_order = torch.randperm(7, generator=generator).tolist()
    first, then = residual_mixes(first_order, keep=7), residual_mixes(then_order, keep=4)
    first_kept, then_kept = sorted(first_order[:7]), sorted(then_order[:4])
    both = composed(first, first_kept, then, then_kept)
    expected = matrix_of(then, then_kept, 7) @ matrix_of(first, first_kept, 12)
    assert torch.equal(matrix_of(both, [first_kept[unit] for unit in then_kept], 12), expected)


def test_pruning_twice_with_merging_is_pruning_once(tmp_path: Path) -> None:
    """From four queries a key to one, then from heads with their own keys to fewer."""
    tiny.write_qwen2(tmp_path / "teacher", num_attention_heads=16, num_key_value_heads=4)
    source = open_hf(tmp_path / "teacher")
    first = plan_of(source, [float(7 * unit % 16) for unit in range(16)], num_attention_heads=8, hidden_size=48)
    once = PrunedSource(source, first)
    scores = scores_of(once.spec, [float(5 * unit % 8) for unit in range(8)])
    second = build_plan(scores, TargetConfig(num_attention_heads=4, merge_head_residuals=True), once.spec)
    twice = PrunedSource(once, second)
    scores = scores_of(twice.spec, [2.0, 4.0, 1.0, 3.0])
    third = build_plan(scores, TargetConfig(num_query_groups=2, hidden_size=40, merge_head_residuals=True), twice.spec)
    assert first.merges
    assert second.merges
    assert all(layer.mixes[Axis.KV_GROUP] for layer in third.layers)
    composed_plan = first.compose(second).compose(third)
    assert composed_plan.digest() == first.compose(second.compose(third)).digest()
    at_once, nested = PrunedSource(source, composed_plan), PrunedSource(twice, third)
    for folder, step in (("once", first), ("twice", second), ("thrice", third)):
        previous = {"once": "teacher", "twice": "once", "thrice": "twice"}[folder]
        write_hf(PrunedSource(open_hf(tmp_path / previous), step), tmp_path / folder)
    stepwise = open_hf(tmp_path / "thrice")
    for name in at_once.names():
        assert torch.equal(at_once.get(name), nested.get(name)), name
        # Rounded after each step, instead of once.
        torch.testing.assert_close(stepwise.get(name), at_once.get(name), rtol=1e-6, atol=2e-7)
    assert PruningPlan.of_checkpoint(tmp_path / "thrice").digest() == composed_plan.digest()
