"""Merging dropped layers: gaps of plans, files of sums, and which weights change."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import PlanError, ScoresError
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan
from nemo_minitron.pruning.merge import Gap, MergeSums, check_mergeable, gaps_of, merge_gaps, mergeable_gaps
from nemo_minitron.pruning.plan import PruningPlan
from tests.tiny import write_llama

SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=16,
    head_dim=4,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24),) * 6,
    max_position_embeddings=64,
    tied_embeddings=True,
)


def without(spec, *dropped):
    whole = PruningPlan.keep_all(spec)
    return replace(whole, layers=tuple(layer for layer in whole.layers if layer.source not in dropped))


def zeros(plan):
    tensors = {}
    for gap in gaps_of(plan):
        neurons = plan.spec.layers[gap.layer].mlp.ffn_hidden_size
        tensors[f"layers.{gap.layer}.moment"] = torch.eye(neurons, dtype=torch.float64)
        tensors[f"layers.{gap.layer}.cross"] = torch.zeros(neurons, plan.spec.hidden_size, dtype=torch.float64)
    return MergeSums(plan.digest(), tensors, {"data_digest": "d"})


def test_gaps_lie_behind_kept_layers():
    assert gaps_of(without(SPEC)) == ()
    assert gaps_of(without(SPEC, 2)) == (Gap(1, 3),)
    assert gaps_of(without(SPEC, 1, 2, 4, 5)) == (Gap(0, 3), Gap(3, 6))
    assert gaps_of(without(SPEC, 0, 1)) == ()


def test_a_file_holds_what_was_saved(tmp_path):
    plan = without(SPEC, 1, 2)
    zeros(plan).save(tmp_path / "sums")
    read = MergeSums.load(tmp_path / "sums")
    read.check_fits(plan)
    assert read.provenance == {"data_digest": "d"}
    content = (tmp_path / "sums").read_bytes()
    (tmp_path / "sums").write_bytes(content[:-8])
    with pytest.raises(ScoresError, match="bytes of tensors"):
        MergeSums.load(tmp_path / "sums")
    with pytest.raises(ScoresError, match="nowhere"):
        MergeSums.load(tmp_path / "nowhere")


def test_sums_of_another_plan_or_not_finite_are_refused():
    plan = without(SPEC, 1, 2)
    with pytest.raises(ScoresError, match="of another plan"):
        zeros(plan).check_fits(without(SPEC, 1))
    sums = zeros(plan)
    sums.tensors["layers.0.moment"][3, 3] = torch.nan
    with pytest.raises(ScoresError, match=r"NaN or infinity in layers\.0\.moment"):
        sums.check_fits(plan)
    fewer = replace(sums, tensors={"layers.0.cross": sums.tensors["layers.0.cross"]})
    with pytest.raises(ScoresError, match=r"layers\.0\.moment missing"):
        fewer.check_fits(plan)


def test_models_whose_mlps_end_with_a_norm_are_refused():
    check_mergeable(SPEC)
    with pytest.raises(PlanError, match="norm at their end"):
        check_mergeable(replace(SPEC, post_norms=True))


def test_layers_that_do_nothing_go_without_a_trace(tmp_path):
    """Only weights before gaps can change, and they do not when the layers in the gap added nothing."""
    write_llama(tmp_path)
    teacher = open_checkpoint(tmp_path)
    plan = without(teacher.spec, 1, 2)
    pruned = PrunedSource(teacher, plan)
    merged = merge_gaps(pruned, zeros(plan), ridge=0.3)
    assert merged.spec == pruned.spec
    assert merged.names() == pruned.names()
    assert all(torch.equal(merged.get(name), pruned.get(name)) for name in merged.names())
    sums = zeros(plan)
    sums.tensors["layers.0.cross"][5, 7] = 1
    merged = merge_gaps(pruned, sums, ridge=0.25)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    change = merged.get(name).double() - pruned.get(name).double()
    # Moment 1, penalty 0.25: neuron 5 says 1 / 1.25 more on channel 7.
    assert change[7, 5].item() == pytest.approx(0.8, abs=1e-6)
    change[7, 5] = 0
    assert change.abs().max() == 0
    assert merged.lineage["pruned"][-1]["merged"] == {"gaps": [[0, 3]], "ridge": 0.25}
    kept = merge_gaps(PrunedSource(teacher, without(teacher.spec)), zeros(without(teacher.spec)), ridge=0.3)
    assert kept.lineage == PrunedSource(teacher, without(teacher.spec)).lineage


def test_a_gap_behind_a_layer_that_loses_its_mlp_is_refused():
    """Nothing of that layer could take on what is missing; behind other layers it is no matter."""
    for bare, refused in ((1, True), (0, False), (4, False)):
        target = TargetConfig(drop_layers=(2, 3), drop_feed_forwards=(bare,), random_seed=0)
        plan = random_plan(target, SPEC, seed=0)
        if not refused:
            assert mergeable_gaps(plan) == (Gap(1, 4),)
            continue
        with pytest.raises(PlanError, match="layer 1 loses its MLP, and layers behind it go"):
            mergeable_gaps(plan)
