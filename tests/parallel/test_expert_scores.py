"""Scores of experts and of their neurons: loops over tokens on what transformers computes, and equal at all layouts."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_minitron.arch.axes import Axis
from nemo_minitron.checkpoints.hf import open_hf
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.sites import ExpertMetric
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.ops.importance import SiteSums
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.scores import Scores
from tests.oracles.experts import ExpertStatistics, statistics
from tests.parallel.expert_jobs import ExpertScoreCase, calibration, score_experts
from tests.ranks import run_on_ranks
from tests.support.expert_models import loaded, write_experts

EP2, TP2, PP2, ONE = (
    ParallelConfig(expert=2),
    ParallelConfig(tensor=2),
    ParallelConfig(pipeline=2),
    ParallelConfig(),
)
LAYOUTS = {
    "EP2": (2, EP2, False),
    "EP2 put down and taken up": (2, EP2, True),
    "TP2": (2, TP2, False),
    "PP2": (2, PP2, False),
    "DP2": (2, ONE, False),
    "TP2 EP2 put down and taken up": (4, ParallelConfig(tensor=2, expert=2), True),
    "EP2 in DP4 put down and taken up": (4, EP2, True),
}
SCORED = ("qwen3_moe, some dense", "qwen2_moe", "olmoe", "dots1")
TARGET = TargetConfig(num_experts=4, expert_ffn_hidden_size=14, num_query_groups=1, hidden_size=40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    for case in SCORED:
        write_experts(root / case.replace(", ", "_").replace(" ", "_"), case)
    return root


def folder_of(root: Path, case: str) -> Path:
    return root / case.replace(", ", "_").replace(" ", "_")


@cache
def _runs(root: Path, world_size: int) -> dict[str, list[dict[str, Tensor]]]:
    """Every layout of a world size in one start, on the toy with a shared expert; 0: one rank, all toys."""
    if world_size == 0:
        names = list(SCORED)
        cases = [ExpertScoreCase(folder_of(root, case), ONE, micro_batch_size=2) for case in names]
    else:
        names = [name for name, (size, *_) in LAYOUTS.items() if size == world_size]
        folder = folder_of(root, "qwen2_moe")
        cases = [ExpertScoreCase(folder, LAYOUTS[name][1], fold=LAYOUTS[name][2]) for name in names]
    results = run_on_ranks(max(world_size, 1), score_experts, cases)
    return {name: [rank[index] for rank in results] for index, name in enumerate(names)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_plans_are_the_same_at_every_layout(layout: str, folders: Path) -> None:
    (alone,) = _runs(folders, 0)["qwen2_moe"]
    spec = open_hf(folder_of(folders, "qwen2_moe")).spec
    plan = build_plan(Scores(spec, alone), TARGET, spec)
    for rank in _runs(folders, LAYOUTS[layout][0])[layout]:
        assert list(rank) == list(alone)
        for name, expected in alone.items():
            torch.testing.assert_close(
                rank[name], expected, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert build_plan(Scores(spec, rank), TARGET, spec).digest() == plan.digest()


def test_a_stage_without_experts_measures_what_one_rank_does(tmp_path: Path) -> None:
    """Of two pipeline stages the first holds the two layers that have an MLP."""
    write_experts(tmp_path, "qwen3_moe, some dense", mlp_only_layers=[0, 1])
    ((alone,),) = run_on_ranks(1, score_experts, [ExpertScoreCase(tmp_path, ONE)])
    cases = [ExpertScoreCase(tmp_path, PP2, fold=fold) for fold in (False, True)]
    assert {name.split(".")[1] for name in alone if ".expert" in name} == {"2"}
    for rank in run_on_ranks(2, score_experts, cases):
        for found in rank:
            assert list(found) == list(alone)
            for name, expected in alone.items():
                torch.testing.assert_close(
                    found[name], expected, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
                )


@torch.no_grad()
def reference(folder: Path) -> tuple[dict[int, ExpertStatistics], dict[int, Tensor]]:
    """By layer: what its experts do in transformers, and what enters the second matrix of its shared expert."""
    model = loaded(folder).double()
    tokens, keep = calibration()
    inputs: dict[int, Tensor] = {}
    shared: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.register_forward_pre_hook(lambda _, args, i=index: inputs.update({i: args[0]}))
            expert = getattr(layer.mlp, "shared_expert", getattr(layer.mlp, "shared_experts", None))
            if expert is not None:
                expert.down_proj.register_forward_pre_hook(
                    lambda _, args, i=index: shared.update({i: args[0].view(*keep.shape, -1)})
                )
    model(tokens, use_cache=False)
    layers = {i: statistics(model.model.layers[i].mlp, x, keep, model.config) for i, x in inputs.items()}
    return layers, shared


@pytest.mark.parametrize("case", SCORED)
def test_scores_are_those_of_loops_over_tokens_and_experts(case: str, folders: Path) -> None:
    (sums,) = _runs(folders, 0)[case]
    folder = folder_of(folders, case)
    expected, shared = reference(folder)
    assert set(shared) == (set(expected) if case in ("qwen2_moe", "dots1") else set())
    keep = calibration()[1]
    spec = open_hf(folder).spec
    scores = Scores(spec, sums)
    assert sorted(expected) == [index for index, layer in enumerate(spec.layers) if layer.has_experts]
    for layer, found in expected.items():
        output, routed = torch.tensor(found.output).double(), torch.tensor(found.routed).double()
        assert routed.max() > routed.min(), "the toy's routers choose all experts equally often"
        for metric, wanted in {
            ExpertMetric.REAP: output / routed.clamp_min(1),
            ExpertMetric.OUTPUT: output / keep.sum(),
            ExpertMetric.FREQUENCY: routed / keep.sum(),
        }.items():
            got = scores.importance(Axis.EXPERT, layer, experts=metric)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        for row in SiteSums.ROWS:
            torch.testing.assert_close(
                sums[f"layers.{layer}.expert_ffn.{row}"], found.site(*row.split(".")), rtol=1e-5, atol=1e-6
            )
        if layer in shared:
            samples = [shared[layer][sample][keep[sample]].abs().mean(0) for sample in range(len(keep))]
            got = sums[f"layers.{layer}.shared_ffn.mean.sum"]
            torch.testing.assert_close(got, torch.stack(samples).sum(0), rtol=1e-5, atol=1e-6)
