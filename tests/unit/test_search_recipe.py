"""Budgets in a recipe: what is refused, what the chain becomes, what a dry run says."""

import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.cli.main import app
from nemo_minitron.config.load import check, load_recipe, to_yaml
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import ConfigError, PlanError
from nemo_minitron.pruning.sizes import student_spec
from nemo_minitron.search.problem import pose, target_by_layer
from nemo_minitron.stages.chain import chain_for
from tests.tiny import write_corpus, write_llama
from tests.unit.search_specs import smollm2


def recipe(**sections) -> RunConfig:
    data = {"name": "small", "model": {"source": "a"}, "data": {"sources": ["b"]}, "target": {"ratio": 0.75}}
    return check(RunConfig, data | sections, source="test")


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"rounds": 2}, "rounds = 2 with a budget (target.ratio)"),
        ({"target": {"ratio": 0.75, "drop_layers": [1]}}, "target.drop_layers with a budget"),
        ({"target": {"ratio": 0.75, "random_seed": 1}}, "target.random_seed with a budget"),
        ({"target": {"ratio": 0.75, "by_layer": {1: {"ffn_hidden_size": 8}}}}, "target.by_layer with a budget"),
        ({"search": {"ranks_per_candidate": 0}}, "search.ranks_per_candidate"),
        ({"target": {"ratio": 0.75, "merge_layers": True}}, "target.merge_layers with a budget"),
        ({"target": {"decode_ms": 5}}, "target.decode_ms needs target.deployment.latency_table"),
        (
            {"target": {"prefill_ms": 5, "deployment": {"latency_table": "t.json", "tensor_parallel": 2}}},
            "target.prefill_ms with target.deployment.tensor_parallel = 2: latency is measured on one device",
        ),
        ({"cluster": {"mfu": 0}}, "cluster.mfu"),
        ({"cluster": {"mfu": 1.5}}, "cluster.mfu"),
        ({"target": {"ratio": 1.5}}, "target.ratio"),
        ({"target": {"params": "100X"}}, "a number, or one with a unit"),
        ({"target": {"params": 0.5}}, "a whole number of at least 1"),
        ({"distill": {"minutes": 5}}, "tokens as fractions need distill.tokens"),
        ({"distill": {"divergence": "reverse_kl"}}, "search.cache.kind: top_k"),
        ({"search": {"cache": {"folder": "x"}}}, "search.cache.folder"),
        ({"search": {"candidates": 4}}, "candidates of the search and of each rung are 4, 12, 4"),
        ({"search": {"space": {"num_layers": {"values": [3], "min": 2}}}}, "values, or min, max and step"),
        ({"search": {"layerwise": {}}}, "search.layerwise: Hugging Face's config.json cannot say it"),
        ({"search": {"spaces": {}}}, "did you mean search.space?"),
    ],
)
def test_what_a_search_cannot_do_is_refused(sections, told):
    with pytest.raises(ConfigError) as caught:
        recipe(**sections)
    assert told in str(caught.value)


def test_a_section_without_a_budget_is_left_alone():
    config = recipe(target={}, rounds=2, search={"layerwise": {}})
    assert "search" not in {stage.name for stage in chain_for(config)}


def test_a_budget_makes_search_a_stage_whose_plan_is_applied():
    stages = {stage.name: stage for stage in chain_for(recipe(cache={}))}
    assert list(stages)[2:7] == ["score", "search", "prune", "cache", "distill"]
    assert stages["prune"].inputs["plan"] == "search/plan.json"
    assert {"import", "data", "score"} == set(stages["search"].needs)


def test_a_race_trains_as_distill_says_without_what_a_cache_lacks():
    config = recipe(
        distill={
            "tokens": 1_000_000,
            "hidden": {"layers": [[-3, -3]]},
            "lm_weight": 0.5,
            "ramp_to": {"temperature": 2.0, "lm_weight": 1.0},
            "batch": {"sequence_length": 100, "global_batch_size": 10},
        }
    )
    trainings = [config.search.race_training(config.distill, rung) for rung in (0, 1)]
    assert [training.steps for training in trainings] == [10, 20]
    assert trainings[0].hidden is None
    assert (trainings[0].lm_weight, trainings[0].ramp_to.lm_weight, trainings[0].ramp_to.temperature) == (
        0.5,
        1.0,
        None,
    )
    assert trainings[0].optimizer == config.distill.optimizer


def test_sizes_are_asked_for_where_a_plan_is_made_without_a_search():
    with pytest.raises(PlanError, match=r"target\.ratio: a budget leaves sizes open"):
        student_spec(TargetConfig(ratio=0.5), smollm2())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_llama(folder / "hf")
    write_corpus(folder / "corpus", documents=3)
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    return folder, [
        f"model.source={folder / 'hf'}",
        f"data.sources=[{folder / 'corpus'}]",
        *(f"target.{name}=null" for name in sizes),
    ]


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160"})


def test_a_dry_run_shows_space_budgets_and_cost(tiny, tmp_path):
    folder, overrides = tiny
    run = ["--run-dir", tmp_path / "run", "--dry-run", "--nproc", "2"]
    done = invoke("search", "tiny/tiny_cpu", *overrides, "target.ratio=0.6", "search.tolerance=0.3", *run)
    assert done.exit_code == 0, done.output
    teacher = parameter_count(open_checkpoint(folder / "hf").spec)
    text = " ".join(done.output.split())
    assert re.search(r"hidden size 64 32, 64 2", text)
    assert re.search(r"layers 4 2, 3, 4 3", text)
    assert f"params {teacher * 6 // 10 / 1e3:.4g} K" in text
    assert re.search(r"[\d,]+ pass, \d+ of them run", text)
    assert re.search(r"at once ─+ pruned 3 512 2 1 3 1 512 2 ", text), "three candidates on two ranks"
    assert re.search(r"the race passes over [\d,]+ tokens at most: about [\d.e-]+ hours on this machine", text)
    assert not list(tmp_path.iterdir())


def test_a_budget_that_nothing_fits_ends_before_any_work(tiny, tmp_path):
    _, overrides = tiny
    done = invoke("run", "tiny/tiny_cpu", *overrides, "target.params=10K", "--run-dir", tmp_path / "run")
    assert done.exit_code == 2
    assert "every shape is above the budget params = 10 K" in done.output
    assert "the nearest is L2-H32-F64-A8-G4" in done.output
    assert not list(tmp_path.iterdir())


def test_the_verb_without_a_budget_says_what_is_missing(tiny, tmp_path):
    _, overrides = tiny
    done = invoke("search", "tiny/tiny_cpu", *overrides, "target.num_layers=3", "--run-dir", tmp_path / "run")
    assert done.exit_code == 2
    assert "no stage 'search'; the recipe's target has no budget" in done.output


def test_how_many_ranks_share_a_candidate_changes_no_result():
    config, other = recipe(), recipe(search={"ranks_per_candidate": 8})
    digests = {}
    for name, each in {"config": config, "other": other, "samples": recipe(search={"samples": 9})}.items():
        [stage] = [stage for stage in chain_for(each) if stage.name == "search"]
        digests[name] = stage.digest_of(stage.settings(each), dict.fromkeys(stage.needs, ""))
    assert digests["config"] == digests["other"] != digests["samples"]


def test_groups_cut_the_batch_into_complete_micro_batches():
    batch = {"sequence_length": 100, "global_batch_size": 6, "micro_batch_size": 1}
    config = recipe(distill={"tokens": 1_000_000, "batch": batch}, search={"space": {"num_layers": {"min": 15}}})
    problem = pose(config, smollm2())
    # Four ranks cannot share a batch of six: two of them can, in two groups.
    assert [problem.groups(tasks, 4) for tasks in (1, 2, 3)] == [2, 2, 4]
    assert problem.groups(5, 1) == 1
    experts = config.model_copy(update={"parallel": ParallelConfig(expert=2)})
    shared = replace(problem, config=experts)
    assert [shared.groups(tasks, 4) for tasks in (1, 3)] == [2, 2], "two ranks share the experts of a candidate"


def test_sizes_of_layers_survive_a_recipe_file(tmp_path):
    by_layer = {3: {"ffn_hidden_size": 768}, 12: {"num_query_groups": 1, "ffn_hidden_size": 0.5}}
    config = recipe(target={"drop_layers": [7], "by_layer": by_layer})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(config))
    assert load_recipe(path) == config
    changed = load_recipe(path, ["target.by_layer.3.ffn_hidden_size=896"]).target
    assert (changed.for_layer(3).ffn_hidden_size, changed.for_layer(12).num_query_groups) == (896, 1)
    assert changed.for_layer(0) == changed


def test_a_choice_of_layers_becomes_sizes_in_a_recipe():
    teacher = smollm2()
    small = teacher.layer.with_sizes(ffn_hidden_size=768)
    few = teacher.layer.with_sizes(num_query_groups=1, num_attention_heads=3)
    chosen = {2: small, 5: small.without("mixer"), 6: teacher.layer.without("feed_forward"), 9: few}
    layers = {number: chosen.get(number, teacher.layer) for number in range(30) if number not in (4, 29)}
    asked = TargetConfig(ratio=0.75, num_layers=28, multiple_of=100, rescale_norms=False)
    target = target_by_layer(asked, teacher, layers)
    assert target.budgets == {}
    assert target.drop_layers == (4, 29)
    assert set(target.by_layer) == {2, 5, 9}
    assert (target.drop_mixers, target.drop_feed_forwards) == ((5,), (6,))
    assert not target.rescale_norms
    assert student_spec(target, teacher).layers == tuple(layers.values())
