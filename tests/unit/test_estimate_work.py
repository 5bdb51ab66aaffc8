"""Estimated work against the papers' own figures and closed forms."""

import pytest

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.hf import read_architecture
from nemo_minitron.cli import recipes
from nemo_minitron.config.load import check, load_recipe
from nemo_minitron.config.parallel import ParallelConfig, Recompute
from nemo_minitron.config.run import RunConfig
from nemo_minitron.estimate.compute import Duration, forward_flops, pipeline_bubble, training_flops
from nemo_minitron.estimate.work import work_of
from nemo_minitron.pruning.rounds import round_specs

NEMOTRON = read_architecture(
    recipes.find("nemotron/nemotron4_15b_to_8b_width_128gpu_a100").parent / "nemotron4_15b.json"
)
SMALL = ModelSpec(
    vocab_size=1000,
    hidden_size=64,
    head_dim=16,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128),) * 3,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    ("sizes", "flops"),
    [
        ({}, 4.4e17),
        ({"hidden_size": 4096, "ffn_hidden_size": 16384}, 2.5e17),
        ({"hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24}, 1.2e17),
    ],
)
def test_a_step_costs_what_the_paper_says(sizes, flops):
    """arXiv:2407.14679 on cost: a step of 1152 samples of 4096 tokens, of 15B, 8B and 4B, in two digits.

    It does not say what is counted; `6 x parameters` gives its numbers, and takes the embedding for a product.
    """
    step = 1152 * 4096 * training_flops(NEMOTRON.with_sizes(**sizes), 4096)
    assert step == pytest.approx(flops, rel=0.15)


def test_operations_of_a_small_model_by_hand():
    matrices = 3 * (64 * (4 + 2 * 2) * 16 + 4 * 16 * 64 + 3 * 64 * 128) + 1000 * 64
    attention = 3 * 4 * 16 * 4 * 32 / 2  # layers, heads, channels, two products, half of 32 positions
    assert forward_flops(SMALL, 32) == 2 * matrices + attention
    assert training_flops(SMALL, 32) == 3 * (2 * matrices + attention)
    ffn = 2 * 3 * 3 * 64 * 128
    assert training_flops(SMALL, 32, recompute=Recompute.SELECTIVE) == 3 * (2 * matrices + attention) + ffn
    assert training_flops(SMALL, 32, recompute=Recompute.FULL) == 4 * (2 * matrices + attention) - 2 * 1000 * 64


def test_a_pipeline_waits_while_it_fills_and_empties():
    assert pipeline_bubble(ParallelConfig(), 5) == 0
    assert pipeline_bubble(ParallelConfig(pipeline=4), 9) == 3 / 12  # 9 micro-batches take 12 turns of 4 stages
    assert pipeline_bubble(ParallelConfig(pipeline=4, virtual_pipeline=3), 9) == 3 / 30


def test_hours():
    duration = Duration(flops=3600 * 1e15, gpus=2, peak=1e15, mfu=0.5)
    assert (duration.hours, duration.gpu_hours) == (1, 2)


def planned(name: str, overrides: list[str], kind: str) -> tuple[RunConfig, float]:
    """A recipe, and the GPU hours of a stage of it."""
    path = recipes.find(name)
    config = load_recipe(path, overrides)
    assert config.model.architecture is not None
    teacher = read_architecture(path.parent / config.model.architecture)
    students = round_specs(config.target, teacher, config.rounds)
    work = work_of(kind, 1, config, teacher, students, ranks=config.cluster.gpus)
    return config, work.duration(config).gpu_hours


def test_qwen3_takes_the_hours_that_its_authors_took():
    """About 6,000 H100 hours, says the README that the recipe names; the recipe's MFU is chosen for it."""
    assert planned("qwen3_8b_to_6b_depth_64gpu_h100", [], "distill")[1] == pytest.approx(6000, rel=0.1)


def test_hours_follow_gpus_bubbles_and_the_cache():
    name = "llama31_8b_to_4b_width_256gpu_h100"
    _, plain = planned(name, [], "distill")
    _, slower = planned(name, ["cluster.mfu=0.2"], "distill")
    _, cached = planned(name, ["cache={}"], "distill")
    _, cache = planned(name, ["cache={}"], "cache")
    _, piped = planned(name, ["parallel.pipeline=2"], "distill")
    assert slower == pytest.approx(2 * plain)
    assert cached + cache == pytest.approx(plain)  # the teacher's share, before or while the student learns
    assert piped == pytest.approx(plain / (1 - 1 / 19))  # 18 micro-batches in 19 turns


def small_recipe(**sections) -> RunConfig:
    data = {"name": "x", "model": {"source": "a"}, "data": {"sources": ["b"]}, **sections}
    return check(RunConfig, data, source="test")


def passes(layers_behind: list[int], *, head: float) -> float:
    """Passes over `SMALL` of runs that begin before a layer, each with so many to go, and of one complete run."""
    whole, output = forward_flops(SMALL, 32), 2 * 1000 * 64
    assert head == output / whole
    return 1 + sum(behind / 3 * (whole - output) + output for behind in layers_behind) / whole


def test_measuring_parts_of_layers_costs_the_layers_behind_them():
    head = 2 * 1000 * 64 / forward_flops(SMALL, 32)
    score = {"samples": 16, "sequence_length": 32, "depth": {"metrics": [], "samples": 5}}
    works = [
        work_of("score", 1, small_recipe(score={**score, "sublayers": on}), SMALL, (SMALL,), ranks=1)
        for on in (False, True)
    ]
    parts = passes([3, 3, 2, 2, 1, 1], head=head) * 5 * 32 * forward_flops(SMALL, 32)
    assert works[1].flops - works[0].flops == pytest.approx(parts)


def test_a_search_layer_by_layer_measures_forms_and_trains_one_candidate_more():
    head = 2 * 1000 * 64 / forward_flops(SMALL, 32)
    search = {
        "candidates": 4,
        "rungs": [{"candidates": 2, "tokens": 128}],
        "samples": 2,
        "seeds": 3,
        "baselines": False,
    }
    layerwise = {"samples": 7, "ffn_hidden_size": [128, 64], "drop": True, "drop_parts": False}
    distill = {"tokens": 256, "batch": {"sequence_length": 32, "global_batch_size": 2}}
    other = {"distill": distill, "target": {"ratio": 0.8}, "export": {"formats": ["nemo"]}}
    recipes = [small_recipe(search=each, **other) for each in (search, {**search, "layerwise": layerwise})]
    found = [work_of("search", 1, recipe, SMALL, (SMALL,), ranks=1) for recipe in recipes]
    measured = passes([3, 3, 2, 2, 1, 1], head=head) * 7 * 32 * forward_flops(SMALL, 32)  # one smaller form, and none
    trained = 3 * (128 * training_flops(SMALL, 32) + 2 * 32 * forward_flops(SMALL, 32))
    assert found[1].flops - found[0].flops == pytest.approx(measured + trained)
    assert found[1].tokens - found[0].tokens == 7 * 32 + 3 * (128 + 2 * 32)
