"""The space of a search: sizes, rules, filtering, and what is said when nothing fits."""

from itertools import product

import pytest

from nemo_minitron.arch.axes import PRUNABLE, SEARCH_ORDER
from nemo_minitron.arch.layer import COUNT_KEYS
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.sizes import SpaceConfig, TargetConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.pruning.sizes import student_spec
from nemo_minitron.search import space as module
from nemo_minitron.search.axes import axes_of, resized, sizes_of
from nemo_minitron.search.choose import DEPTH, UNIFORM, choose_candidates, depth_alone
from nemo_minitron.search.measures import limits, measures
from nemo_minitron.search.space import find_shapes, make_space
from tests.unit.search_specs import smollm2

SPACE = {
    "num_layers": {"min": 16},
    "hidden_size": {"step": 64},
    "ffn_hidden_size": {"step": 256},
    "num_attention_heads": [3, 6, 9],
    "num_query_groups": [1, 2, 3],
}


def problem(*, target=None, space=SPACE, tolerance=0.05, parallel=None, **search):
    wanted = TargetConfig(**(target or {"ratio": 0.75}))
    config = SearchConfig(space=space, tolerance=tolerance, **search)
    teacher = smollm2()
    made = make_space(config, wanted, teacher, parallel or ParallelConfig())
    upper = limits(wanted, teacher)
    return made, measures(teacher, wanted.deployment, [*upper, "params"]), upper


def found(**settings):
    made, measured, upper = problem(**settings)
    return find_shapes(made, measured, upper, tolerance=settings.get("tolerance", 0.05))


@pytest.mark.parametrize("chunk", [10**7, 100])
def test_filtering_is_what_trying_every_shape_gives(monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    result = found(target={"ratio": 0.75, "kv_cache": "30MB"}, tolerance=0.1)
    teacher = smollm2()
    limit = parameter_count(teacher) * 3 // 4
    hidden, ffn = range(320, 577, 64), range(768, 1537, 256)
    expected, ruled_out, above = set(), 0, {"params": 0, "kv_cache": 0}
    for layers, channels, neurons, heads, groups in product(range(16, 31), hidden, ffn, (3, 6, 9), (1, 2, 3)):
        if heads % groups or heads // groups > 3:
            ruled_out += 1
            continue
        spec = resized(teacher, (layers, channels, neurons, heads, groups))
        cache = 2 * layers * groups * 64 * 4096 * 2
        shares = {"params": parameter_count(spec) / limit, "kv_cache": cache / 30e6}
        for name, share in shares.items():
            above[name] += share > 1
        if 0.9 <= max(shares.values()) <= 1:
            expected.add((layers, channels, neurons, heads, groups))
    assert {tuple(map(int, row)) for row in result.shapes} == expected
    assert len(result.shapes) == len(expected)
    assert result.ruled_out == ruled_out
    assert result.above == above


def test_every_axis_has_a_key_in_the_recipe():
    names = {row.size for row in PRUNABLE} | set(COUNT_KEYS)
    assert set(SpaceConfig.model_fields) == names
    assert {axis for axis in SEARCH_ORDER} == {row.axis for row in PRUNABLE}
    assert names <= set(TargetConfig.model_fields)
    assert sizes_of(smollm2()) == (30, 576, 1536, 9, 3)
    assert sizes_of(resized(smollm2(), (20, 512, 1024, 6, 2))) == (20, 512, 1024, 6, 2)


def test_without_a_word_heads_stay_and_other_axes_go_down_to_half():
    made, *_ = problem(space={})
    by_name = {axis.key: values for axis, values in zip(made.axes, made.values, strict=True)}
    assert by_name["num_attention_heads"] == (9,)
    assert by_name["num_query_groups"] == (3,)
    assert by_name["num_layers"] == tuple(range(15, 31))
    assert by_name["hidden_size"][0] == 288
    assert by_name["hidden_size"][-1] == 576


def test_the_teachers_size_belongs_to_the_space_though_it_is_no_multiple():
    made, *_ = problem(space={"hidden_size": {"step": 128}})
    assert made.values[1] == (384, 512, 576)


def test_sizes_that_the_target_names_are_fixed():
    made, *_ = problem(target={"ratio": 0.75, "hidden_size": 512, "ffn_hidden_size": 0.5}, space={})
    assert made.values[1:3] == ((512,), (768,))


def test_a_fraction_of_an_axis_is_the_size_that_a_target_without_a_budget_gets():
    def size(multiple: int, fraction: float, **more) -> int:
        sizes = {"num_layers": fraction, "multiple_of": {"num_layers": multiple}}
        made, *_ = problem(target={"ratio": 0.75, **sizes}, space={}, **more)
        assert made.values[0] == (student_spec(TargetConfig(**sizes), smollm2()).num_layers,)
        return made.values[0][0]

    assert size(4, 0.6) == 20, "18 lies between 16 and 20: halves go up"
    assert size(4, 0.05) == 4, "at least one step"
    assert size(4, 0.99) == 28, "no more than the teacher has"


def test_the_depth_baseline_is_a_shape_of_the_space():
    def depth(**settings):
        made, measured, upper = problem(**settings)
        return depth_alone(made, measured, upper)

    space = {"num_layers": {"min": 16}}
    assert depth(space=space) == (20, 576, 1536, 9, 3)
    # 28,312,128 of embedding and norm, 1,769,472 + 884,736 + 1,152 of a layer: 27 of them stay within 100,886,256.
    narrow = depth(space=space, target={"ratio": 0.75, "ffn_hidden_size": 1024})
    assert narrow == (27, 576, 1024, 9, 3)
    assert depth(space={"num_layers": {"min": 16, "step": 3}}) == (18, 576, 1536, 9, 3)
    assert depth(space={"num_layers": {"min": 24}}) is None, "as deep as that it is too large"
    assert depth(space={}, target={"ratio": 0.75, "num_layers": 18}) is None, "no layers go but those that must"
    heads = {"num_attention_heads": [6, 8], "num_query_groups": [2, 3]}
    assert depth(space={**space, **heads}) is None, "8 heads cannot be of 3 groups"
    assert depth(space={**space, "hidden_size": {"max": 512}})[1] == 512


def test_sizes_divide_by_tensor_parallel_sizes_of_run_and_deployment():
    target = {"ratio": 0.75, "deployment": {"tensor_parallel": 3}, "num_query_groups": 3}
    space = {"ffn_hidden_size": {"step": 64}, "num_attention_heads": [3, 6, 9]}
    made, *_ = problem(target=target, space=space)
    assert all(size % 192 == 0 for size in made.values[2])
    with pytest.raises(SearchError, match="num_query_groups: 3 is not a multiple of 2"):
        problem(space={}, parallel=ParallelConfig(tensor=2))


@pytest.mark.parametrize(
    ("space", "target", "told"),
    [
        ({"num_layers": {"min": 20, "max": 10}}, {}, "num_layers.min = 20 is above max = 10"),
        ({"num_layers": [40]}, {}, "40 is above the teacher's 30"),
        ({"hidden_size": {"min": 500, "max": 510, "step": 64}}, {}, "no multiple of 64 lies between 500 and 510"),
        ({"hidden_size": [100]}, {"multiple_of": 64}, "100 is not a multiple of 64"),
        ({"hidden_size": [512]}, {"hidden_size": 512}, "target.hidden_size = 512 and search.space.hidden_size"),
        ({"num_attention_heads": [4], "num_query_groups": [3]}, {}, "no number of heads in .4. goes with KV groups"),
        ({"num_attention_heads": [9], "num_query_groups": [1]}, {}, "a group has no more heads than the teacher's"),
        (
            {"num_attention_heads": [9], "num_query_groups": [1]},
            {},
            "change search.space.num_attention_heads or search.space.num_query_groups",
        ),
    ],
)
def test_rules_that_contradict_each_other(space, target, told):
    with pytest.raises(SearchError) as caught:
        problem(space=space, target={"ratio": 0.75, **target})
    assert told.replace(".4.", "[4]") in str(caught.value)


def test_nothing_fits_says_which_budget_binds_and_the_nearest_shape():
    with pytest.raises(SearchError) as caught:
        found(target={"params": "10M", "kv_cache": "1GB"})
    text = str(caught.value)
    assert "every shape is above the budget params = 10 M" in text
    assert "the nearest is L16-H320-F768-A3-G1" in text
    smallest = parameter_count(resized(smollm2(), (16, 320, 768, 3, 1)))
    assert f"it needs params {smallest / 1e6:.4g} M" in text
    assert "kv_cache" not in text


def test_nothing_near_a_budget_names_the_tolerance_that_would_do():
    with pytest.raises(SearchError) as caught:
        found(space={"num_layers": [16], "hidden_size": [320, 576], "ffn_hidden_size": [1536]}, tolerance=0.01)
    use = parameter_count(resized(smollm2(), (16, 576, 1536, 9, 3))) / (parameter_count(smollm2()) * 3 // 4)
    assert "the nearest within the budgets is L16-H576-F1536-A9-G3" in str(caught.value)
    needed = float(str(caught.value).split("search.tolerance=")[1].split()[0])
    assert 0 <= needed - (1 - use) <= 0.001
    assert len(found(space={"num_layers": [16], "hidden_size": [320, 576]}, tolerance=needed).shapes)


def test_candidates_begin_with_the_baselines_and_spread_out():
    made, measured, upper = problem()
    result = find_shapes(made, measured, upper, tolerance=0.05)
    chosen = choose_candidates(made, result, 12, measured, upper)
    assert [candidate.label for candidate in chosen] == [UNIFORM, DEPTH, *[""] * 10]
    assert len({candidate.sizes for candidate in chosen}) == 12
    fitting = {tuple(map(int, row)) for row in result.shapes}
    assert all(candidate.sizes in fitting for candidate in chosen if candidate.label != DEPTH)
    # Layers 134,515,008 - 28,311,552 (embedding) - 576 (norm) over 30, of which 20 stay within three quarters.
    assert chosen[1].sizes == (20, 576, 1536, 9, 3)
    assert {candidate.sizes[0] for candidate in chosen} >= {30, min(row[0] for row in fitting)}
    assert choose_candidates(made, result, 12, measured, upper) == chosen


def test_uniform_scaling_takes_one_factor():
    made, measured, upper = problem(space={"num_layers": {"min": 16}, "hidden_size": {"step": 32}})
    result = find_shapes(made, measured, upper, tolerance=0.05)
    layers, hidden, ffn, *_ = choose_candidates(made, result, 1, measured, upper)[0].sizes
    scales = [layers / 30, hidden / 576, ffn / 1536]
    assert max(scales) / min(scales) < 1.06


def test_all_that_fit_are_candidates_if_there_are_few():
    made, measured, upper = problem(space={"num_layers": [20, 21]}, target={"ratio": 0.76})
    result = find_shapes(made, measured, upper, tolerance=0.03)
    chosen = choose_candidates(made, result, 1000, measured, upper)
    assert {candidate.sizes for candidate in chosen} >= {tuple(map(int, row)) for row in result.shapes}


def test_axes_have_a_letter_each():
    assert len({row.symbol for row in PRUNABLE}) == len(PRUNABLE)
    assert "".join(axis.symbol for axis in axes_of(smollm2())) == "LHFAG"


def test_fractions_of_a_range_stay_inside_it():
    """0.7 of 30 layers is 21, by its decimal digits; 0.75 of 30 lies between 22 and 23."""
    layers = [
        problem(space={"num_layers": wanted})[0].values[0]
        for wanted in ({"max": 0.75}, {"max": 0.7}, {"min": 0.75}, {"min": 0.7})
    ]
    assert [found[-1] for found in layers[:2]] == [22, 21]
    assert [found[0] for found in layers[2:]] == [23, 21]
