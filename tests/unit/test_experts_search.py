"""A search for a mixture of experts under budgets of all and of active parameters."""

from pathlib import Path

import pytest

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import read_architecture
from nemo_minitron.cli.recipes import find
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.problem import pose

RECIPE = find("qwen3_30b_a3b_to_22b_width_64gpu_h100")
OPEN = ["target.num_experts=null", "target.expert_ffn_hidden_size=null", "search.candidates=12"]


def recipe(*changes: str) -> tuple[RunConfig, ModelSpec]:
    config = load_recipe(RECIPE, [*OPEN, *changes])
    return config, read_architecture(Path(config.model.architecture))


def test_candidates_keep_to_both_budgets_and_counts_are_exact() -> None:
    config, teacher = recipe("target.params=23B", "target.active_params=3.1B")
    problem = pose(config, teacher)
    assert len(problem.candidates) == 12
    for candidate in problem.candidates:
        spec = problem.spec(candidate.sizes)
        experts = spec.layer.moe
        assert experts.num_experts % 8 == 0, "parallel.expert divides them"
        assert experts.num_experts >= experts.top_k == 8
        for name, active in (("params", False), ("active_params", True)):
            count = parameter_count(spec, active=active)
            assert problem.measured[name](candidate.sizes) == count
            assert count <= problem.limits[name]
        assert f"E{experts.num_experts}" in candidate.name
    assert len({problem.spec(each.sizes).layer.moe.num_experts for each in problem.candidates}) > 1


def test_what_no_search_of_experts_does_is_told() -> None:
    for changes, words in (
        (("target.params=23B", "search.layerwise={}", "export.formats=[nemo]"), "layerwise for a model with experts"),
        (("target.decode_ms=10", "target.deployment.latency_table=table.json"), "decode_ms for a model with experts"),
        (
            ("target.params=23B", "parallel.expert=4", "search.space.num_experts={values: [4]}"),
            "fewer experts than a token is routed to",
        ),
    ):
        config, teacher = recipe(*changes)
        with pytest.raises(SearchError, match=words):
            pose(config, teacher)
