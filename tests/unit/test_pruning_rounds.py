"""Sizes of iterative pruning: interpolated as in the paper, valid in every round, exact in the last."""

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.load import check
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import PlanError
from nemo_minitron.pruning.rounds import between, round_specs, round_targets
from nemo_minitron.pruning.sizes import student_spec


def spec(*, layers=30, hidden=576, ffn=1536, heads=9, groups=3, head_dim=64) -> ModelSpec:
    layer = transformer_layer(num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=ffn)
    return ModelSpec(
        vocab_size=1000,
        hidden_size=hidden,
        head_dim=head_dim,
        layers=(layer,) * layers,
        max_position_embeddings=2048,
    )


def target(**sizes) -> TargetConfig:
    return check(TargetConfig, sizes, source="test")


def test_one_step_is_the_target_itself():
    wanted = target(num_layers=24, ffn_hidden_size=0.75)
    assert round_targets(wanted, spec(), 1) == (wanted,)


def test_sizes_lie_evenly_between_teacher_and_target():
    specs = round_specs(target(num_layers=24, ffn_hidden_size=1248, hidden_size=480), spec(), 3)
    assert [found.num_layers for found in specs] == [28, 26, 24]
    assert [found.layers[0].mlp.ffn_hidden_size for found in specs] == [1440, 1344, 1248]
    assert [found.hidden_size for found in specs] == [544, 512, 480]


def test_what_divides_both_ends_divides_the_sizes_between():
    # Llama-3.1-8B to the Minitron 4B width: 4096 to 3072 and 14336 to 9216.
    teacher = spec(layers=32, hidden=4096, ffn=14336, heads=32, groups=8, head_dim=128)
    specs = round_specs(target(hidden_size=3072, ffn_hidden_size=9216), teacher, 3)
    assert [found.hidden_size % 256 for found in specs] == [0, 0, 0]
    assert [found.layers[0].mlp.ffn_hidden_size % 1024 for found in specs] == [0, 0, 0]


def test_heads_stay_equal_in_their_groups():
    teacher = spec(heads=32, groups=8)
    specs = round_specs(target(num_attention_heads=12, num_query_groups=4, num_layers=24), teacher, 3)
    shapes = [
        (found.layers[0].attention.num_query_groups, found.layers[0].attention.num_attention_heads) for found in specs
    ]
    assert shapes[-1] == (4, 12)
    assert all(heads % groups == 0 for groups, heads in shapes)
    assert shapes == sorted(shapes, reverse=True)


def test_named_layers_go_in_the_order_in_which_they_are_named():
    targets = round_targets(target(drop_layers=(20, 3, 21, 4)), spec(), 2)
    # Without layers 3 and 20, the layers 21 and 4 are number 19 and 3.
    assert [found.drop_layers for found in targets] == [(20, 3), (19, 3)]
    assert [found.num_layers for found in round_specs(target(drop_layers=(20, 3, 21, 4)), spec(), 2)] == [28, 26]


def test_a_round_that_cuts_nothing_is_refused():
    with pytest.raises(PlanError, match=r"steps = 5: round \d would cut nothing"):
        round_targets(target(num_layers=28), spec(), 5)


def test_layers_of_different_sizes_go_in_one_step_only():
    small, large = spec(layers=1, ffn=1024), spec(layers=1)
    mixed = replace(large, layers=(*small.layers, *large.layers))
    with pytest.raises(PlanError, match="layers differ in size"):
        round_targets(target(ffn_hidden_size=512), mixed, 2)


def test_sizes_obey_multiple_of():
    specs = round_specs(target(ffn_hidden_size=0.5, multiple_of={"ffn_hidden_size": 128}), spec(), 4)
    assert [found.layers[0].mlp.ffn_hidden_size for found in specs] == [1280, 1152, 896, 768]


@given(st.integers(1, 4000), st.integers(0, 3000), st.integers(1, 12))
def test_a_path_is_monotone_ends_at_the_target_and_stays_near_the_straight_line(last, cut, steps):
    first = last + cut
    sizes = [between(first, last, number, steps) for number in range(1, steps + 1)]
    assert sizes[-1] == last
    assert sizes == sorted(sizes, reverse=True)
    for number, size in enumerate(sizes, start=1):
        exact = first - number * cut / steps
        assert abs(size - exact) <= ceil(cut / steps) / 2 + 1


@given(
    st.integers(1, 8).flatmap(lambda groups: st.tuples(st.just(groups), st.integers(1, groups))),
    st.integers(1, 8).flatmap(lambda heads: st.tuples(st.just(heads), st.integers(1, heads))),
    st.integers(2, 6),
)
def test_every_round_is_a_model_one_could_have_asked_for(groups, per_group, steps):
    teacher = spec(layers=40, heads=groups[0] * per_group[0], groups=groups[0])
    wanted = target(num_attention_heads=groups[1] * per_group[1], num_query_groups=groups[1], num_layers=20)
    specs = round_specs(wanted, teacher, steps)
    assert specs[-1] == student_spec(wanted, teacher)


def test_sizes_of_single_layers_are_for_one_round():
    with pytest.raises(PlanError, match="layers differ in size"):
        round_targets(target(by_layer={1: {"ffn_hidden_size": 768}}), spec(), 2)
