"""The choice of each layer's form: against trying every combination, and by hand."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.config.budget import DeploymentConfig
from nemo_minitron.config.load import check
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.sizes import LayerwiseConfig, TargetConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.layerwise import choose_layers, layer_costs, layer_variants
from nemo_minitron.search.measures import measures
from nemo_minitron.search.space import make_space
from nemo_minitron.stages import layerwise
from tests.unit.search_specs import smollm2


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all_combinations(seed):
    rng = np.random.default_rng(seed)
    losses = rng.exponential(size=(6, 4)) * [0, 1, 2, 4]
    costs = {"params": np.array([1000.0, 700, 400, 0]), "kv_cache": np.array([16.0, 16, 8, 0])}
    limits = {"params": float(rng.integers(1500, 5500)), "kv_cache": float(rng.integers(30, 90))}
    chosen = choose_layers(losses, costs, limits, dropped=3, least_layers=2)
    best = min(
        (
            forms
            for forms in product(range(4), repeat=6)
            if all(sum(costs[name][form] for form in forms) <= limits[name] for name in costs)
            and sum(form != 3 for form in forms) >= 2
        ),
        key=lambda forms: sum(losses[layer, form] for layer, form in enumerate(forms)),
    )
    assert tuple(chosen) == best


def test_no_choice_within_a_budget_says_how_much_is_needed():
    losses, costs = np.zeros((3, 2)), {"params": np.array([2e6, 1e6])}
    with pytest.raises(SearchError, match="params: at least 3 M of 2 M"):
        choose_layers(losses, costs, {"params": 2e6})


def test_forms_of_a_layer_are_its_sizes_and_none():
    settings = LayerwiseConfig(ffn_hidden_size=(1.0, 0.5), num_query_groups=(3, 1))
    layer = smollm2().layer
    forms = layer_variants(settings, TargetConfig(), layer, ParallelConfig())
    expected = [(1536, 3, 9), (1536, 1, 3), (768, 3, 9), (768, 1, 3)]
    assert [
        (form.mlp.ffn_hidden_size, form.attention.num_query_groups, form.attention.num_attention_heads)
        for form in forms[:-1]
    ] == expected
    assert forms[0] == layer
    assert forms[-1] is None
    rounded = layer_variants(settings, TargetConfig(multiple_of=500), layer, ParallelConfig())
    assert {form.mlp.ffn_hidden_size for form in rounded[1:-1]} == {1500, 1000}


def test_a_layer_may_lose_one_part_and_what_that_saves_is_not_overrated():
    teacher = smollm2()
    settings = LayerwiseConfig(ffn_hidden_size=(1.0, 0.5), num_query_groups=(3, 1), drop=False, drop_parts=True)
    forms = layer_variants(settings, TargetConfig(), teacher.layer, ParallelConfig())
    alone = [form for form in forms if len(form.parts) == 1]
    assert {tuple(form.sizes.values()) for form in alone} == {(1536,), (768,), (9, 3), (3, 1)}
    assert len(forms) == 8
    space = make_space(SearchConfig(), TargetConfig(params="1M"), teacher, ParallelConfig())
    measured = measures(teacher, DeploymentConfig(sequence_length=100), ["params", "kv_cache"])
    costs, fixed = layer_costs(space, forms, measured, {"params": 1, "kv_cache": 1})
    for place, form in enumerate(forms):
        real = parameter_count(replace(teacher, layers=(form,)))
        assert 0 <= fixed["params"] + costs["params"][0, place] - real <= teacher.hidden_size
        assert (costs["kv_cache"][0, place] == 0) == (form.mixer is None)


def test_costs_of_layers_add_up_to_those_of_the_model():
    teacher = smollm2()
    target = TargetConfig(params="1M", kv_cache="1GB")
    space = make_space(SearchConfig(), target, teacher, ParallelConfig())
    measured = measures(teacher, DeploymentConfig(sequence_length=100), ["params", "kv_cache"])
    small = transformer_layer(num_attention_heads=6, num_query_groups=2, ffn_hidden_size=700)
    costs, fixed = layer_costs(space, [teacher.layer, small, None], measured, {"params": 1, "kv_cache": 1})
    mixed = teacher.__class__(
        **{
            **{name: getattr(teacher, name) for name in teacher.__slots__},
            "layers": (teacher.layer, small, small, teacher.layer),
        }
    )
    assert costs["params"].shape == (30, 3)
    total = fixed["params"] + 2 * costs["params"][0, 0] + 2 * costs["params"][1, 1]
    assert total == parameter_count(mixed)
    assert (costs["params"][:, 2] == 0).all()
    assert costs["kv_cache"].tolist() == [[2 * 3 * 64 * 100 * 2, 2 * 2 * 64 * 100 * 2, 0]] * 30
    assert fixed["kv_cache"] == 0


def test_a_local_layer_costs_the_cache_of_its_window():
    full, local = (
        transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, local=local)
        for local in (False, True)
    )
    teacher = replace(smollm2(), hidden_size=32, head_dim=8, layers=(local, local, full) * 2, sliding_window=10)
    space = make_space(SearchConfig(), TargetConfig(kv_cache="1MB"), teacher, ParallelConfig())
    measured = measures(teacher, DeploymentConfig(sequence_length=100), ["params", "kv_cache"])
    small = transformer_layer(num_attention_heads=2, num_query_groups=1, ffn_hidden_size=64)
    costs, fixed = layer_costs(space, [full, small, None], measured, {"params": 1, "kv_cache": 1})
    position = 2 * 8 * 2  # keys and values, channels of a group, bytes
    windowed, complete = ([2 * length * position, length * position, 0] for length in (10, 100))
    assert costs["kv_cache"].tolist() == [windowed, windowed, complete] * 2
    assert fixed["kv_cache"] == 0
    assert len(set(costs["params"][:, 0])) == 1, "weights are the same"
    # Of equal losses: enough room for one complete layer, not for two.
    losses = np.tile([0.0, 1.0, 2.0], (6, 1))
    limit = (4 * 2 * 10 + 2 * 100 + 100) * position
    chosen = choose_layers(losses, {"kv_cache": costs["kv_cache"]}, {"kv_cache": limit}, dropped=2)
    assert sorted(chosen[index] for index in (2, 5)) == [0, 1]
    assert [chosen[index] for index in (0, 1, 3, 4)] == [0, 0, 0, 0]


def test_a_search_goes_on_with_the_forms_that_were_measured(here, tmp_path):
    """Three KV groups go on two tensor-parallel ranks in no form; two do."""

    def context(**parallel):
        search = {"layerwise": {"num_query_groups": [3, 1], "ffn_hidden_size": [1536], "drop": False}}
        sections = {"search": search, "parallel": parallel, "export": {"formats": ["nemo"]}, "target": {"ratio": 0.8}}
        data = {"name": "x", "model": {"source": "a"}, "data": {"sources": ["b"]}, **sections}
        return SimpleNamespace(out=tmp_path, rank=0, config=check(RunConfig, data, source="test"))

    layerwise.check_forms(context(), smollm2())
    told = [{"num_attention_heads": 9, "num_query_groups": 3, "ffn_hidden_size": 1536}]
    told.append({"num_attention_heads": 3, "num_query_groups": 1, "ffn_hidden_size": 1536})
    (tmp_path / layerwise.FILE).write_text(json.dumps({"forms": told, "rise": [[0.0, 0.1]] * 30}))
    layerwise.check_forms(context(), smollm2())
    with pytest.raises(SearchError, match=r"other sizes of layers than those of parallel.tensor = 2"):
        layerwise.check_forms(context(tensor=2), smollm2())
