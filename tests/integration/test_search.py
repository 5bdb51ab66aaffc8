"""Stage search on the tiny model: candidates, a failure, a resumption, layers that differ, the recipe it leaves."""

import csv
import json
from pathlib import Path

import pytest
import torch

from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.config.load import load_recipe
from nemo_minitron.errors import TrainingError
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.stages import search as module
from tests.chain_jobs import merged, run_to, weights
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow

NO_SIZES = dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"))
SEARCH = {
    "space": {"num_layers": [2, 3, 4], "hidden_size": [32, 48, 64], "ffn_hidden_size": [32, 64, 96]},
    "tolerance": 0.2,
    "candidates": 5,
    "samples": 4,
    "rungs": [{"candidates": 3, "tokens": 512}, {"candidates": 2, "tokens": 1024}],
    "seeds": 2,
    "baselines": True,
}
FAILING = "L3-H48-"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    return folder


def settings(**search):
    return {"target": {**NO_SIZES, "ratio": 0.6}, "search": {**SEARCH, **search}}


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A search in which one candidate fails, and that is cut off after the first trained one."""
    folder = tmp_path_factory.mktemp("search") / "run"
    trained = module.trained_loss_of
    count = [0]

    def failing(source, *arguments, **named):
        if count[0] == 1:
            count[0] += 1
            raise KeyboardInterrupt
        count[0] += 1
        if source.spec.hidden_size == 48 and source.spec.num_layers == 3:
            raise TrainingError("this one cannot be trained")
        return trained(source, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trained_loss_of", failing)
        with pytest.raises(KeyboardInterrupt):
            run_to(folder, inputs, "prune", **settings())
        lines = (folder / "stages/.search.partial/measured.jsonl").read_text().splitlines()
        results = run_to(folder, inputs, "prune", **settings())
    return folder, results, len(lines)


def test_every_candidate_is_on_record(run):
    folder, results, before = run
    data = json.loads((folder / "stages/search/candidates.json").read_text())
    rows = list(csv.DictReader((folder / "stages/search/candidates.csv").open()))
    assert [row["name"] for row in rows] == [row["name"] for row in data["candidates"]]
    assert results["search"]["candidates"] == len(rows) >= 3
    teacher = parameter_count(open_checkpoint(folder / "stages/import/teacher").spec)
    assert all(int(row["params"]) <= 0.6 * teacher for row in rows)
    assert all(float(row["loss_pruned"]) > 0 for row in rows)
    assert [rung["tokens"] for rung in data["rungs"]] == [0, 512, 1024]
    assert all(len(losses) == 2 for losses in data["rungs"][2]["by_seed"].values())
    assert before < len((folder / "stages/search/measured.jsonl").read_text().splitlines())


def test_a_failing_candidate_keeps_its_reason(run):
    _, results, _ = run
    failed = results["search"]["failed"]
    assert failed == {name: "TrainingError: this one cannot be trained" for name in failed}
    assert failed
    assert all(name.startswith(FAILING) for name in failed)
    assert results["search"]["winner"] not in failed


def test_no_measurement_is_made_twice(run):
    folder, *_ = run
    rows = [json.loads(line) for line in (folder / "stages/search/measured.jsonl").read_text().splitlines()]
    assert len({(row["candidate"], row["rung"], row["seed"]) for row in rows}) == len(rows)


def test_the_winner_is_what_is_pruned(run):
    folder, results, _ = run
    data = json.loads((folder / "stages/search/candidates.json").read_text())
    best = min(data["rungs"][-1]["losses"].items(), key=lambda pair: pair[1])[0]
    assert data["winner"] == results["search"]["winner"] == best
    plan = PruningPlan.load(folder / "stages/search/plan.json")
    assert plan.digest() == PruningPlan.load(folder / "stages/prune/plan.json").digest()
    assert results["prune"]["parameters"] == parameter_count(plan.student)
    assert (folder / "stages/search/pareto.svg").read_text().startswith("<svg")


def test_the_recipe_of_the_winner_prunes_the_same_without_a_search(run, inputs, tmp_path):
    folder, *_ = run
    recipe = load_recipe(folder / "stages/search/recipe.yaml")
    assert recipe.target.budgets == {}
    target = recipe.target.model_dump(mode="json")
    run_to(tmp_path / "run", inputs, "prune", target=target)
    mine, other = weights(tmp_path / "run", "prune"), weights(folder, "prune")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_layers_that_differ(inputs, tmp_path):
    """Silencing units gives the loss that cutting them gives, and the choice keeps to the budget."""
    layerwise = {"ffn_hidden_size": [1.0, 0.5], "num_query_groups": [1.0, 0.5], "samples": 4}
    changes = settings(layerwise=layerwise, baselines=False, seeds=1, rungs=[{"candidates": 1, "tokens": 512}])
    results = run_to(tmp_path / "run", inputs, "search", **changes, export={"formats": ["nemo"]})
    folder = tmp_path / "run/stages/search"
    data = json.loads((folder / "candidates.json").read_text())
    row = data["candidates"][-1]
    assert row["name"] == "layerwise"
    assert row["failed"] == ""
    assert row["params"] <= data["budgets"]["params"]
    assert row["loss_rung1"] > 0
    assert results["search"]["winner"] in (data["winner"], "layerwise")
    check_block_losses(tmp_path / "run", inputs, json.loads((folder / "block_losses.json").read_text()), changes)


def check_block_losses(run: Path, inputs: Path, losses: dict, changes: dict) -> None:
    """Cut one layer's neurons, another's groups, drop a third: each alone."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.pruning.build import build_plan_by_layer
    from nemo_minitron.pruning.scores import Scores
    from nemo_minitron.stages.race import loss_of

    config = merged(inputs, **changes, export={"formats": ["nemo"]})
    teacher = open_checkpoint(run / "stages/import/teacher")
    scores = Scores.load(run / "stages/score/scores.safetensors")
    forms = losses["forms"]
    try:
        for layer, form in ((0, 1), (2, 2), (1, 3), (3, 4)):
            sizes = dict(enumerate(teacher.spec.layers))
            if forms[form].get("dropped"):
                del sizes[layer]
            else:
                before = sizes[layer]
                groups = forms[form]["num_query_groups"]
                sizes[layer] = type(before)(
                    num_attention_heads=groups * before.num_attention_heads // before.num_query_groups,
                    num_query_groups=groups,
                    ffn_hidden_size=forms[form]["ffn_hidden_size"],
                )
            plan = build_plan_by_layer(scores, config.target, sizes, provenance={})
            cut = loss_of(PrunedSource(teacher, plan), config, run / "stages/data")
            assert losses["base"] + losses["rise"][layer][form] == pytest.approx(cut, abs=2e-5)
    finally:
        runtime.stop()
