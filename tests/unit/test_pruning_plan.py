"""Plans: what is decided from given scores, what is refused, and how a plan is kept."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.arch.axes import LAYER_AXES, Axis
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.config.sizes import LayerSizes, TargetConfig
from nemo_minitron.errors import PlanError, ScoresError
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.sizes import student_spec
from tests.support.plans import changed, layer_plan
from tests.support.scores import sums
from tests.support.small_spec import SPEC


def scores_with(**values: list[float]) -> Scores:
    """Scores whose importance along an axis is the given list in every layer, and 1 everywhere else."""
    found, _ = sums(SPEC, samples=1)
    for name in found:
        if name.startswith("layers."):
            found[name] = torch.ones_like(found[name])
    for layer in range(4):
        prefix = f"layers.{layer}."
        for site in ("hidden.attention", "hidden.mlp", "ffn", "head"):
            wanted = values.get(site.split(".")[0])
            if wanted is not None:
                for kind in ("mean", "l2"):
                    vector = torch.tensor(wanted).double()
                    vector = vector.repeat_interleave(SPEC.head_dim) if site == "head" else vector
                    found[f"{prefix}{site}.{kind}.sum"], found[f"{prefix}{site}.{kind}.sumsq"] = vector, vector**2
        if "layers" in values:
            found[f"{prefix}block_influence.sum"] = torch.tensor(values["layers"][layer]).double()
    return Scores(SPEC, found, provenance={"data_digest": "d"})


def plan_for(scores: Scores, target: dict[str, Any]) -> PruningPlan:
    return build_plan(scores, TargetConfig(**target), SPEC)


def test_the_highest_stay() -> None:
    scores = scores_with(
        hidden=[1, 9, 2, 8, 3, 7],
        ffn=[5, 1, 4, 2, 3],
        head=[1, 2, 9, 1, 4, 3],  # groups (0, 1), (2, 3), (4, 5): 3, 10, 7
        layers=[0.1, 0.4, 0.2, 0.3],
    )
    target = {
        "num_layers": 2,
        "hidden_size": 3,
        "ffn_hidden_size": 2,
        "num_query_groups": 2,
        "num_attention_heads": 2,
    }
    plan = plan_for(scores, target)
    assert plan.hidden == (1, 3, 5)
    assert [layer.source for layer in plan.layers] == [1, 3]
    assert plan.layers[0] == layer_plan(source=1, kv_groups=(1, 2), heads=(2, 4), ffn=(0, 2))
    assert plan.student.layers == (transformer_layer(num_attention_heads=2, num_query_groups=2, ffn_hidden_size=2),) * 2
    assert plan.student.hidden_size == 3
    assert plan.student.head_dim == 2


def test_ties_go_to_the_lower_index() -> None:
    plan = plan_for(scores_with(), {"num_layers": 3, "hidden_size": 4, "ffn_hidden_size": 2, "num_attention_heads": 3})
    assert plan.hidden == (0, 1, 2, 3)
    assert [layer.source for layer in plan.layers] == [0, 1, 2]
    assert plan.layers[0] == layer_plan(source=0, kv_groups=(0, 1, 2), heads=(0, 2, 4), ffn=(0, 1))


def test_groups_without_a_number_of_heads_keep_theirs() -> None:
    plan = plan_for(scores_with(head=[1, 1, 3, 3, 2, 2]), {"num_query_groups": 2})
    assert (plan.layers[0].kept[Axis.KV_GROUP], plan.layers[0].kept[Axis.HEAD]) == ((1, 2), (2, 3, 4, 5))


def test_named_layers_go_whatever_they_score() -> None:
    plan = plan_for(scores_with(layers=[1, 2, 3, 4]), {"drop_layers": [3, 1]})
    assert [layer.source for layer in plan.layers] == [0, 2]
    assert plan.provenance["target"]["drop_layers"] == [3, 1]


def test_nothing_asked_for_keeps_everything() -> None:
    plan = plan_for(scores_with(), {})
    assert plan.is_identity
    assert plan.digest() == PruningPlan.keep_all(SPEC).digest()


def test_aggregations_of_the_target_are_used() -> None:
    found, _ = sums(SPEC, samples=5)
    scores = Scores(SPEC, found)
    for batch in ("mean", "l2", "var"):
        for sequence in ("mean", "l2", "var"):
            aggregations = {"batch_aggregation": batch, "sequence_aggregation": sequence}
            plan = plan_for(scores, {"hidden_size": 3, **aggregations})
            values = scores.importance(Axis.HIDDEN, batch=batch, sequence=sequence).tolist()
            assert plan.hidden == tuple(sorted(sorted(range(6), key=lambda index: -values[index])[:3]))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"num_layers": 5}, "num_layers = 5, the teacher has 4"),
        ({"hidden_size": 7}, "hidden_size = 7, the teacher has 6"),
        ({"ffn_hidden_size": 6}, "ffn_hidden_size = 6, the teacher has 5"),
        ({"num_attention_heads": 12}, "num_attention_heads = 12, the teacher has 6"),
        ({"num_query_groups": 4}, "num_query_groups = 4, the teacher has 3"),
        ({"num_attention_heads": 4}, "num_attention_heads = 4 is not a multiple of num_query_groups = 3"),
        ({"num_query_groups": 1, "num_attention_heads": 3}, "1 KV groups have 2 heads"),
    ],
)
def test_sizes_that_cannot_be_are_refused(target: dict[str, int], words: str) -> None:
    for act in (lambda: plan_for(scores_with(), target), lambda: student_spec(TargetConfig(**target), SPEC)):
        with pytest.raises(PlanError, match=words):
            act()


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        plan_for(scores_with(), {"num_layers": 9, "hidden_size": 99, "ffn_hidden_size": 999})
    assert all(number in str(caught.value) for number in ("9,", "99,", "999,"))


@pytest.mark.parametrize(
    ("drop", "target", "words"),
    [
        ([4], {}, r"drop_layers = \[4\]: the teacher's layers are 0-3"),
        ([-1], {}, "0-3"),
        ([1, 1], {}, "twice"),
        ([0, 1, 2, 3], {}, "zero layers"),
        ([0], {"num_layers": 2}, "num_layers = 2, but drop_layers leaves 3"),
    ],
)
def test_layers_that_cannot_be_dropped(drop: list[int], target: dict[str, int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_for(scores_with(), target | {"drop_layers": drop})


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.0, 1.5, -0.5, True, "80%", float("nan")])
@pytest.mark.parametrize("name", ["num_layers", "ffn_hidden_size"])
def test_sizes_that_are_neither_a_count_nor_a_share_do_not_pass_the_recipe(name: str, size: Any) -> None:
    with pytest.raises(ValueError, match="at least 1, or a share of the teacher's between 0 and 1"):
        TargetConfig(**{name: size})


# -- shares and divisors ----------------------------------------------------------------------------------------------

LARGE = replace(
    SPEC,
    hidden_size=96,
    head_dim=4,
    layers=(transformer_layer(num_attention_heads=12, num_query_groups=4, ffn_hidden_size=150),) * 10,
)


@pytest.mark.parametrize(
    ("target", "changed"),
    [
        ({"hidden_size": 0.5}, {"hidden_size": 48}),
        ({"hidden_size": 0.51}, {"hidden_size": 49}),
        ({"ffn_hidden_size": 0.55}, {"ffn_hidden_size": 83}),  # 82.5: halves up
        ({"ffn_hidden_size": 0.001}, {"ffn_hidden_size": 1}),
        ({"num_layers": 0.75}, {"num_layers": 8}),  # 7.5
        ({"num_attention_heads": 0.5}, {"num_attention_heads": 8}),  # 6 is no multiple of 4 groups; 8 as near as 4
        ({"num_attention_heads": 0.2}, {"num_attention_heads": 4}),
        ({"num_query_groups": 0.5}, {"num_query_groups": 2, "num_attention_heads": 6}),
        ({"num_query_groups": 0.5, "num_attention_heads": 0.9}, {"num_query_groups": 2, "num_attention_heads": 6}),
        ({"num_query_groups": 3, "num_attention_heads": 0.5}, {"num_query_groups": 3, "num_attention_heads": 6}),
        ({"hidden_size": 0.6, "multiple_of": 32}, {"hidden_size": 64}),  # 57.6
        ({"hidden_size": 0.99, "multiple_of": 64}, {"hidden_size": 64}),  # never more than there is
        ({"hidden_size": 0.1, "multiple_of": 32}, {"hidden_size": 32}),  # never none
        ({"ffn_hidden_size": 0.5, "multiple_of": {"ffn_hidden_size": 50}}, {"ffn_hidden_size": 100}),
        ({"hidden_size": 0.5, "multiple_of": {"ffn_hidden_size": 50}}, {"hidden_size": 48}),
        ({"num_layers": 0.5, "multiple_of": {"num_layers": 4}}, {"num_layers": 4}),
        ({"num_attention_heads": 0.8, "multiple_of": {"num_attention_heads": 6}}, {"num_attention_heads": 12}),
        ({"hidden_size": 64, "multiple_of": 32}, {"hidden_size": 64}),
        ({"multiple_of": 7}, {}),  # what is not asked for stays
    ],
)
def test_shares_of_the_teacher(target: dict[str, Any], changed: dict[str, int]) -> None:
    expected = LARGE.with_sizes(**changed)
    found = student_spec(TargetConfig(**target, rescale_norms=False), LARGE)
    assert found == expected


def test_a_share_is_taken_of_each_layer() -> None:
    layers = tuple(
        transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=size) for size in (10, 20)
    )
    student = student_spec(TargetConfig(ffn_hidden_size=0.7), replace(SPEC, layers=layers))
    assert [layer.mlp.ffn_hidden_size for layer in student.layers] == [7, 14]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"hidden_size": 50, "multiple_of": 32}, "hidden_size = 50 is not a multiple of multiple_of.hidden_size = 32"),
        ({"hidden_size": 0.5, "multiple_of": 128}, "hidden_size = 0.5 is 128 as a multiple of 128, the teacher has 96"),
        ({"num_attention_heads": 0.5, "multiple_of": {"num_attention_heads": 7}}, "28, but 4 KV groups have 12 heads"),
        ({"num_layers": 0.5, "drop_layers": [0]}, "num_layers = 0.5, but drop_layers leaves 9"),
    ],
)
def test_divisors_that_cannot_be(target: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        student_spec(TargetConfig(**target), LARGE)


def test_layers_may_have_sizes_of_their_own() -> None:
    scores = scores_with(ffn=[5, 1, 4, 2, 3], head=[1, 2, 9, 1, 4, 3])
    by_layer = {1: {"ffn_hidden_size": 2}, 3: {"num_query_groups": 1, "ffn_hidden_size": 0.4}}
    target = {"drop_layers": [0], "ffn_hidden_size": 4, "by_layer": by_layer}
    plan = plan_for(scores, target)
    assert plan.layers == (
        layer_plan(source=1, kv_groups=(0, 1, 2), heads=(0, 1, 2, 3, 4, 5), ffn=(0, 2)),
        layer_plan(source=2, kv_groups=(0, 1, 2), heads=(0, 1, 2, 3, 4, 5), ffn=(0, 2, 3, 4)),
        layer_plan(source=3, kv_groups=(1,), heads=(2, 3), ffn=(0, 2)),
    )
    assert student_spec(TargetConfig(**target), SPEC) == plan.student


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"by_layer": {4: {"ffn_hidden_size": 2}}}, "by_layer.4: the teacher's layers are 0-3"),
        ({"by_layer": {1: {"ffn_hidden_size": 6}}}, "by_layer.1: ffn_hidden_size = 6, the teacher has 5"),
        ({"by_layer": {1: {"num_attention_heads": 4}}}, "by_layer.1: num_attention_heads = 4 is not a multiple of"),
        ({"by_layer": {1: {"ffn_hidden_size": 2}}, "drop_layers": [1]}, "by_layer.1: drop_layers drops it"),
    ],
)
def test_sizes_of_single_layers_that_cannot_be(target: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        student_spec(TargetConfig(**target), SPEC)


def test_every_size_of_a_layer_can_be_said_of_a_single_one() -> None:
    assert {row.size for row in LAYER_AXES} <= set(LayerSizes.model_fields)


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(ScoresError, match="another model"):
        build_plan(scores_with(), TargetConfig(), replace(SPEC, hidden_size=8))


def test_student_spec_is_the_plans_student() -> None:
    target = {"num_layers": 2, "hidden_size": 4, "ffn_hidden_size": 3, "num_query_groups": 1}
    assert student_spec(TargetConfig(**target), SPEC) == plan_for(scores_with(), target).student


def test_epsilon_follows_the_number_of_channels_only_with_rescaling() -> None:
    assert plan_for(scores_with(), {"hidden_size": 4}).student.norm_eps == pytest.approx(1.5e-5, rel=1e-11)
    assert plan_for(scores_with(), {"hidden_size": 4, "rescale_norms": False}).student.norm_eps == 1e-5
    assert plan_for(scores_with(), {"ffn_hidden_size": 4}).student.norm_eps == 1e-5


# -- keeping a plan ---------------------------------------------------------------------------------------------------


def test_file_round_trip(tmp_path: Path) -> None:
    plan = plan_for(scores_with(hidden=[1, 9, 8, 7, 3, 5], layers=[4, 3, 2, 1]), {"hidden_size": 4, "num_layers": 3})
    plan.save(tmp_path / "plan.json")
    read = PruningPlan.load(tmp_path / "plan.json")
    assert read == plan
    assert read.digest() == plan.digest()
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["hidden"] == "1-3,5"
    assert data["layers"][0] == {"source": 0, "kv_groups": "0-2", "heads": "0-5", "ffn": "0-4"}
    assert data["provenance"]["scores"]["data_digest"] == "d"


def test_digest_covers_the_decision_only_and_is_the_same_everywhere() -> None:
    plan = PruningPlan.keep_all(SPEC)
    assert replace(plan, provenance={"who": "me"}).digest() == plan.digest()
    assert replace(plan, hidden=(0, 1)).digest() != plan.digest()
    assert replace(plan, rescale_norms=False).digest() != plan.digest()
    code = "import tests.unit.test_pruning_plan as t; print(t.PruningPlan.keep_all(t.SPEC).digest())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert run.stdout.strip() == plan.digest()


def test_table_shows_before_and_after() -> None:
    table = plan_for(scores_with(layers=[4, 1, 2, 3]), {"num_layers": 3, "hidden_size": 3}).table()
    rows = {line[:18].strip(): line.split()[-3:] for line in table.splitlines()}
    assert rows["layers"] == ["4", "3", "75.0%"]
    assert rows["hidden size"] == ["6", "3", "50.0%"]
    assert table.endswith("layers dropped: 1")
    # embedding and head 16*6 each, final norm 6; a layer: norms 12, qkv 24*6, proj 6*12, fc1 10*6, fc2 6*5
    assert rows["parameters"][0] == f"{2 * 96 + 6 + 4 * (12 + 144 + 72 + 60 + 30):,}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": "0-9"}, "0..5"),
        ({"hidden": "3,2"}, "ascending"),
        ({"hidden": "1,1"}, "ascending"),
        ({"hidden": "0-99999999999999"}, "0..5"),
        ({"hidden": "a"}, "not an index"),
        ({"hidden": ""}, "none are kept"),
        ({"hidden": 3}, "PruningPlan"),
        ({"layers": []}, "zero layers"),
        ({"format": "other"}, "not known"),
        ({"version": 99}, "not known"),
        ({"norm_scale": [4, 3]}, "unknown key(s) norm_scale in version 1"),
        ({"version": 2, "norm_scale": [4, "3"]}, "two numbers of channels"),
        ({"version": 2, "norm_scale": [4, 0]}, "no ratio of channels"),
        ({"other": 1}, "unknown key(s) other"),
        ({"spec": {}}, "architecture"),
    ],
)
def test_damaged_plans_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PruningPlan.keep_all(SPEC).to_dict() | change))
    with pytest.raises(PlanError) as caught:
        PruningPlan.load(tmp_path / "plan.json")
    assert words in str(caught.value)
    assert "plan.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "{}"])
def test_files_that_are_no_plans_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    for path in (tmp_path / "plan.json", tmp_path / "absent.json"):
        with pytest.raises(PlanError, match=path.name):
            PruningPlan.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": (0, 1, 2, 4, 5)}, "unequal"),
        ({"heads": (0, 2)}, "KV group 2 stays without any of its heads"),
        ({"heads": (0, 1, 2, 3, 4), "kv_groups": (0, 1, 2)}, "unequal"),
        ({"heads": (0, 1, 2, 3), "kv_groups": (0, 2)}, "KV group 1 does not"),
        ({"heads": ()}, "heads: none are kept"),
        ({"ffn": ()}, "ffn: none are kept"),
        ({"ffn": (4, 5)}, "indices 4 to 5 of 5"),
        ({"kv_groups": ()}, "kv_groups: none"),
        ({"source": 7}, "indices"),
        ({"heads": (0, 2, 4), "merged_heads": ((1, ((1, 2), (3, -1))),)}, "merged heads: unit 1 does not stay"),
        ({"merged_heads": ((1, ((1, 2), (6, -1))),)}, "not ascending units of 6"),
        ({"merged_heads": ((1, ((2, 2), (0, -1))),)}, "not ascending units of 6"),
        ({"merged_heads": ((1, ((1, 0),)),)}, "coefficient of 0"),
        ({"merged_groups": ((1, ((1, 2),)), (0, ((0, 2),)))}, "merged kv_groups: not ascending"),
    ],
)
def test_layers_that_cannot_be_are_refused(change: dict[str, Any], words: str) -> None:
    plan = PruningPlan.keep_all(SPEC)
    with pytest.raises(PlanError, match=words):
        replace(plan, layers=(*plan.layers[:2], changed(plan.layers[2], **change)))


def test_layers_named_twice_or_out_of_order_are_refused() -> None:
    plan = PruningPlan.keep_all(SPEC)
    for order in ((0, 0), (1, 0)):
        with pytest.raises(PlanError, match="layers: not ascending"):
            replace(plan, layers=tuple(plan.layers[index] for index in order))
