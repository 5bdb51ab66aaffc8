"""Depth scores as data: candidates, values by hand, merging, the choice of layers, and every way they can be wrong."""

from typing import Any

import pytest
import torch

from nemo_minitron.config.depth import DepthConfig
from nemo_minitron.config.load import check
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import ConfigError, ScoresError
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.depth import DepthScores, candidate_blocks, kept_layers
from nemo_minitron.pruning.scores import Scores
from tests.support.depth_scores import BLOCKS, SPEC, number, tensors
from tests.support.scores import sums


def test_candidates_are_every_block_that_leaves_a_layer():
    assert candidate_blocks(4, range(1, 4)) == tuple(BLOCKS)
    assert candidate_blocks(3) == ((0, 1), (1, 1), (2, 1))
    assert len(candidate_blocks(30, range(1, 30))) == 30 * 31 // 2 - 1


def test_blocks_of_some_lengths_are_measured_with_single_layers_or_without():
    def candidates(layers: int, **depth: Any) -> tuple[tuple[int, int], ...]:
        return candidate_blocks(layers, DepthConfig.model_validate({"metrics": ["lm_loss"], **depth}).lengths(layers))

    triples = [(0, 3), (1, 3)]
    some = {"blocks": True, "shortest_block": 3, "longest_block": 3}
    assert sorted(candidates(4, **some)) == sorted([*candidate_blocks(4), *triples])
    assert candidates(4, **some, single_layers=False) == tuple(triples)
    assert candidates(4, blocks=True) == tuple(BLOCKS)
    assert candidates(4) == candidate_blocks(4)


def test_blocks_without_single_layers_choose_the_best_block_and_no_layer_one_by_one():
    places = [BLOCKS.index((first, 2)) for first in range(3)]
    found = {name: tensor[places] if tensor.dim() else tensor for name, tensor in tensors().items()}
    scores = DepthScores(SPEC, found)
    assert scores.lengths == (2,)
    assert scores.curve("lm_loss", 2).tolist() == DepthScores(SPEC, tensors()).curve("lm_loss", 2).tolist()
    with pytest.raises(ScoresError, match="not measured for blocks of 1 layers"):
        scores.layers("lm_loss")
    told = problems(
        score={"depth": {"metrics": ["lm_loss"], "blocks": True, "single_layers": False}},
        target={"num_layers": 2, "depth_metric": "lm_loss"},
    )
    assert "score.depth.single_layers = false does not measure them so" in told
    assert "single_layers = false leaves nothing" in problems(score={"depth": {"single_layers": False}})


def test_values_are_rises_of_the_mean_loss_and_relative_squared_changes():
    scores = DepthScores(SPEC, tensors())
    assert scores.metrics == ("lm_loss", "logit_mse")
    assert scores.layers("lm_loss").tolist() == pytest.approx([0.5, 0.1, 0.2, 0.3])
    assert scores.layers("logit_mse").tolist() == [4 / 16, 8 / 16, 2 / 16, 1 / 16]
    assert scores.curve("lm_loss", 2).tolist() == pytest.approx([0.6, 0.9, 0.4])
    assert scores.base("lm_loss") == 3
    assert (scores.best_block("lm_loss", 2), scores.best_block("lm_loss", 3)) == (2, 0)


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ({}, (2, 3)),  # block influence below
        ({"depth_metric": "lm_loss"}, (0, 3)),
        ({"depth_metric": "logit_mse"}, (0, 1)),
        ({"depth_metric": "lm_loss", "depth_contiguous": True}, (0, 1)),
        ({"depth_metric": "logit_mse", "depth_contiguous": True}, (2, 3)),  # all equal: the lowest
    ],
)
def test_layers_are_chosen_by_the_metric_that_the_target_names(target, kept):
    influence = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert kept_layers(influence, DepthScores(SPEC, tensors()), TargetConfig(**target), 2) == kept


def test_keeping_every_layer_needs_no_block():
    target = TargetConfig(depth_metric="lm_loss", depth_contiguous=True)
    assert kept_layers(torch.zeros(4), DepthScores(SPEC, tensors()), target, 4) == (0, 1, 2, 3)


def test_a_plan_takes_depth_scores_out_of_the_score_file(tmp_path):
    found, _ = sums(SPEC)
    scores = Scores(SPEC, found, depth=DepthScores(SPEC, tensors()))
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert all(torch.equal(loaded.depth.tensors[name], value) for name, value in tensors().items())
    plan = build_plan(loaded, TargetConfig(num_layers=2, depth_metric="logit_mse"), SPEC)
    assert [layer.source for layer in plan.layers] == [0, 1]


def test_merging_adds_sums_and_leaves_the_parts_alone():
    one, other = DepthScores(SPEC, tensors()), DepthScores(SPEC, tensors(depth__lm_loss__base=number(70)))
    merged = one.merge(other)
    assert merged.tensors["depth.lm_loss.sum"].tolist() == [70, 72, 74, 62, 78, 76, 64, 68, 66]
    assert (merged.base("lm_loss"), merged.samples, merged.blocks) == (100 / 20, 4, tuple(BLOCKS))
    assert one.base("lm_loss") == 3


def test_what_measures_other_things_cannot_be_merged():
    fewer = {name: value for name, value in tensors().items() if "logit" not in name}
    with pytest.raises(ScoresError, match=r"different metrics \(lm_loss, logit_mse; lm_loss\)"):
        DepthScores(SPEC, tensors()).merge(DepthScores(SPEC, fewer))
    with pytest.raises(ScoresError, match="the same metrics"):
        DepthScores(SPEC, tensors()).joined([DepthScores(SPEC, tensors())])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth__lm_loss__sum": torch.tensor([35, 36, torch.nan, 31, 39, 38, 32, 34, 33]).double()}, "layers 0-2"),
        ({"depth__lm_loss__sum": torch.tensor([35, 36, 1, 31, 39, 38, torch.inf, 34, 33]).double()}, "without layer 2"),
        ({"depth__lm_loss__base": number(torch.nan)}, "of the complete model is NaN"),
        ({"depth__lm_loss__count": number(0)}, "lm_loss counts nothing"),
        ({"depth__logit_mse__base": number(0)}, "logit_mse counts nothing"),
        ({"depth__lm_loss__sum": torch.zeros(8).double()}, r"shaped \(8,\)"),
        ({"depth__lm_loss__sum": torch.zeros(9)}, "float32"),
        ({"depth__samples": number(-1)}, "depth.samples = -1"),
        ({"depth__lm_loss__more": number(1)}, "lm_loss.more missing or unknown"),
        ({"depth__blocks": torch.tensor([*BLOCKS[:-1], (3, 2)]).double()}, r"candidates \[\(3, 2\)\]"),
        ({"depth__blocks": torch.tensor([*BLOCKS[:-1], (0, 1)]).double()}, "named twice"),
        ({"depth__blocks": torch.tensor([*BLOCKS[1:], (0, 4)]).double()}, "layer 0 not measured"),
        ({"depth__blocks": torch.zeros(9).double()}, "first layer and length"),
    ],
)
def test_damaged_depth_scores_say_what_is_wrong(changes, message):
    with pytest.raises(ScoresError, match=message):
        DepthScores(SPEC, tensors(**changes))


def test_depth_scores_without_a_sum_or_metric_are_refused():
    found = tensors()
    del found["depth.lm_loss.base"]
    with pytest.raises(ScoresError, match=r"lm_loss\.base missing"):
        DepthScores(SPEC, found)
    with pytest.raises(ScoresError, match="without a metric"):
        DepthScores(SPEC, {name: value for name, value in tensors().items() if name.count(".") == 1})
    assert DepthScores.from_tensors(SPEC, {"samples": number(1)}) is None


def test_a_target_that_the_scores_cannot_answer_says_how_to_get_them():
    target = TargetConfig(depth_metric="lm_loss", depth_contiguous=True)
    with pytest.raises(ScoresError, match="no depth metrics") as caught:
        kept_layers(torch.zeros(4), None, target, 3)
    assert "score.depth.metrics=[lm_loss]" in caught.value.remedy
    single = {"depth.blocks": torch.tensor([(i, 1) for i in range(4)]).double(), "depth.samples": number(1)}
    for part, value in (("sum", torch.ones(4).double()), ("base", number(1)), ("count", number(1))):
        single[f"depth.lm_loss.{part}"] = value
    with pytest.raises(ScoresError, match="blocks of 2 layers") as caught:
        kept_layers(torch.zeros(4), DepthScores(SPEC, single), target, 2)
    assert "score.depth.blocks=true" in caught.value.remedy
    with pytest.raises(ScoresError, match="errors is not in the scores, which have lm_loss") as caught:
        kept_layers(torch.zeros(4), DepthScores(SPEC, single), TargetConfig(depth_metric="errors"), 2)
    assert "score.depth.metrics" in caught.value.remedy


def recipe(**sections):
    return {"name": "n", "model": {"source": "m"}, "data": {"sources": ["t"]}, **sections}


def test_a_recipe_names_its_metrics():
    depth = {"metrics": ["lm_loss", "my.tasks:errors"], "blocks": True}
    target = {"depth_metric": "errors", "depth_contiguous": True}
    config = check(RunConfig, recipe(score={"depth": depth}, target=target), source="test")
    assert config.score.depth.names == ("lm_loss", "errors")
    assert RunConfig.model_validate(recipe()).target.depth_metric == "block_influence"


def problems(**sections) -> str:
    with pytest.raises(ConfigError) as caught:
        check(RunConfig, recipe(**sections), source="test")
    return "\n".join(caught.value.problems)


def test_every_problem_of_a_recipes_depth_keys_is_told():
    told = problems(score={"depth": {"metrics": ["loss", "block_influence"], "samples": 0}})
    assert "score.depth.metrics.0 = 'loss': one of lm_loss, logit_mse" in told
    assert "score.depth.metrics.1 = 'block_influence'" in told
    assert "always measured" in told
    assert "score.depth.samples = 0" in told
    told = problems(score={"depth": {"blocks": False, "longest_block": 3}})
    assert "longest_block needs blocks = true" in told
    told = problems(score={"depth": {"blocks": False, "shortest_block": 3}})
    assert "shortest_block needs blocks = true" in told
    told = problems(score={"depth": {"metrics": ["lm_loss"], "blocks": True, "shortest_block": 3, "longest_block": 2}})
    assert "shortest_block = 3 is above longest_block = 2" in told
    told = problems(score={"depth": {"blocks": True}})
    assert "blocks = true measures nothing without metrics" in told
    told = problems(score={"depth": {"metrics": ["a.b:errors", "c:errors", "c:lm_loss"]}})
    assert "give a name twice" in told
    assert "['c:lm_loss'] have the name of a metric that exists" in told
    told = problems(target={"depth_metric": "lm_loss", "depth_contiguous": True})
    assert "target.depth_metric = 'lm_loss' is not measured: add it to score.depth.metrics" in told
    assert "set score.depth.blocks=true" in told
    told = problems(target={"depth_contiguous": True})
    assert "needs a metric of complete blocks" in told
