"""Depth metrics: what leaving layers out costs, against transformers and complete passes, the same at every layout."""

from functools import cache

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.pruning.depth import DepthScores, candidate_blocks
from tests.parallel.depth_jobs import DepthCase, measure, measure_all, measure_folder, naive
from tests.parallel.megatron_jobs import SPECS
from tests.ranks import RankError, run_on_ranks
from tests.tiny import write_llama
from tests.tolerances import TOL

TP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
LAYOUTS = {
    "micro-batches of 4": (1, DepthCase("tied", micro_batch_size=4)),
    "TP2": (2, DepthCase("tied", TP2)),
    "TP2 untied": (2, DepthCase("untied", TP2, micro_batch_size=2)),
    "PP2": (2, DepthCase("tied", PP2, micro_batch_size=2)),
    "PP2, uneven stages and layers": (2, DepthCase("uneven", PP2)),
    "PP2 VPP2": (2, DepthCase("untied", ParallelConfig(pipeline=2, virtual_pipeline=2), micro_batch_size=2)),
    "DP2": (2, DepthCase("tied", micro_batch_size=2)),
    "TP2 PP2": (4, DepthCase("tied", ParallelConfig(tensor=2, pipeline=2), micro_batch_size=4)),
    "PP2 DP2": (4, DepthCase("uneven", PP2)),
    "PP4": (4, DepthCase("untied", ParallelConfig(pipeline=4), micro_batch_size=8)),
}
DEAD = 2


@cache
def runs(world):
    """Every case of a world size in one start of the ranks; 0 stands for the plain runs they are compared with."""
    if world == 0:
        names = [name for name in SPECS if name != "three groups"]
        (results,) = run_on_ranks(1, measure_all, [*(DepthCase(name) for name in names), DepthCase("tied", dead=DEAD)])
        return {name: [result] for name, result in zip([*names, "dead"], results, strict=True)}
    names = [name for name, (size, _) in LAYOUTS.items() if size == world]
    results = run_on_ranks(world, measure_all, [LAYOUTS[name][1] for name in names])
    return {name: [rank[index] for rank in results] for index, name in enumerate(names)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_depth_metrics_are_the_same_at_every_layout_and_on_every_rank(layout):
    world, case = LAYOUTS[layout]
    (alone,) = runs(0)[case.spec]
    for rank in runs(world)[layout]:
        assert set(rank) == set(alone)
        for name, expected in alone.items():
            torch.testing.assert_close(
                rank[name], expected, **TOL[torch.float32], msg=lambda text, n=name: f"{n}: {text}"
            )
        assert all(torch.equal(rank[name], runs(world)[layout][0][name]) for name in alone), "ranks disagree"


def test_a_dead_layer_costs_nothing_and_the_others_do():
    scores = DepthScores(SPECS["tied"], runs(0)["dead"][0])
    for metric in scores.metrics:
        assert scores.layers(metric)[DEAD] == 0, metric
        others = [
            value for block, value in zip(scores.blocks, scores.values(metric), strict=True) if block != (DEAD, 1)
        ]
        assert all(value != 0 for value in others) or metric == "misses", metric
    # A block that holds the dead layer costs what the block without it costs.
    values = dict(zip(scores.blocks, scores.values("lm_loss").tolist(), strict=True))
    assert values[DEAD - 1, 2] == pytest.approx(values[DEAD - 1, 1], abs=1e-6)
    assert values[DEAD, 2] == pytest.approx(values[DEAD + 1, 1], abs=1e-6)


@pytest.mark.parametrize("spec", ["tied", "uneven"])
def test_sums_are_those_of_whole_passes_over_models_without_the_layers(spec):
    ((smart, totals),) = run_on_ranks(1, naive, spec)
    tokens = smart["depth.lm_loss.count"]
    found = torch.cat([smart["depth.lm_loss.base"][None], smart["depth.lm_loss.sum"]])
    torch.testing.assert_close(found / tokens, torch.stack(list(totals.values())) / tokens, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth") / "hf"
    model = write_llama(folder, tied=False)
    generator = torch.Generator().manual_seed(5)
    return folder, model.double(), torch.randint(0, 256, (3, 25), generator=generator)


def test_metrics_are_those_of_transformers_without_the_layers(tiny):
    folder, model, samples = tiny
    (found,) = run_on_ranks(1, measure_folder, folder, samples.tolist())
    layers = list(model.model.layers)

    def without(first, length):
        kept = [layer for number, layer in enumerate(layers) if not first <= number < first + length]
        model.model.layers = torch.nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        with torch.no_grad():
            logits = model(samples[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
        return loss, logits

    full_loss, full = without(0, 0)
    scores = DepthScores.from_tensors(read_spec(folder), found)
    assert scores.blocks == candidate_blocks(4, range(1, 4))
    assert scores.base("lm_loss") == pytest.approx(full_loss.item(), abs=1e-6)
    for block, increase, mse in zip(scores.blocks, scores.values("lm_loss"), scores.values("logit_mse"), strict=True):
        loss, logits = without(*block)
        assert increase.item() == pytest.approx((loss - full_loss).item(), abs=2e-6), block  # a difference of two
        assert mse.item() == pytest.approx(((full - logits) ** 2).sum().item() / (full**2).sum().item(), rel=1e-5)


def read_spec(folder):
    from nemo_minitron.checkpoints.open import open_checkpoint

    return open_checkpoint(folder).spec


def test_infinite_activations_are_reported_by_layer():
    with pytest.raises(RankError, match=r"NaN or infinity in what layer 2 returns"):
        run_on_ranks(1, measure, DepthCase("tied", poison=2))
