"""Stage search on the tiny model: candidates, a failure, a resumption, layers that differ, the recipe it leaves."""

import csv
import json
from pathlib import Path

import pytest
import torch

from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.load import load_recipe
from nemo_minitron.json_lines import read_rows
from nemo_minitron.pruning.plan import PruningPlan
from tests.chain_jobs import weights
from tests.ranks import RankError, run_on_ranks
from tests.search_jobs import losses_of_cuts, run_where_layers_win, run_with_failures, settings
from tests.support.own_groups import connecting_themselves, free_port
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A search in which one candidate fails, and that is cut off after the first trained one."""
    folder = tmp_path_factory.mktemp("search") / "run"
    assert run_on_ranks(1, run_with_failures, folder, inputs, "prune", settings(), 1) == [None]
    lines = (folder / "stages/.search.partial/measured.jsonl").read_text().splitlines()
    [results] = run_on_ranks(1, run_with_failures, folder, inputs, "prune", settings(), None)
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
    assert all(name.startswith("L3-H48-") for name in failed)
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
    run_on_ranks(1, run_with_failures, tmp_path / "run", inputs, "prune", {"target": target}, None)
    mine, other = weights(tmp_path / "run", "prune"), weights(folder, "prune")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_layers_that_differ(inputs, tmp_path):
    """Silencing units gives the loss that cutting them gives, and the choice keeps to the budget."""
    layerwise = {"ffn_hidden_size": [1.0, 0.5], "num_query_groups": [1.0, 0.5], "samples": 4, "drop_parts": True}
    rungs = [{"candidates": 1, "tokens": 512}]
    changes = settings(layerwise=layerwise, baselines=False, seeds=1, rungs=rungs)
    changes["target"]["ratio"] = 0.65  # keeps all layers, at two sizes
    changes["export"] = {"formats": ["nemo"]}
    [results] = run_on_ranks(1, run_where_layers_win, tmp_path / "run", inputs, "prune", changes)
    folder = tmp_path / "run/stages/search"
    data = json.loads((folder / "candidates.json").read_text())
    assert data["winner"] == "layerwise"
    row = data["candidates"][-1]
    assert row["name"] == "layerwise"
    assert row["failed"] == ""
    assert row["params"] <= data["budgets"]["params"]
    assert set(data["rungs"][1]["losses"]) == {data["rungs"][0]["order"][0], "layerwise"}
    assert results["prune"]["parameters"] <= data["budgets"]["params"]
    losses = json.loads((folder / "block_losses.json").read_text())
    cuts = [(0, 1), (2, 2), (1, 3), (3, 8), (1, 4), (2, 5), (0, 7)]
    assert losses["forms"][8] == {"dropped": True}
    assert [form.get("without") for form in losses["forms"]] == [
        *(None,) * 4,
        *(["mixer"], ["feed_forward"], ["feed_forward"], ["mixer"]),
        None,
    ]
    told = [(layer, losses["forms"][form]) for layer, form in cuts]
    [expected] = run_on_ranks(1, losses_of_cuts, tmp_path / "run", inputs, changes, told)
    found = [losses["base"] + losses["rise"][layer][form] for layer, form in cuts]
    assert found == pytest.approx(expected, abs=2e-5)
    trained_by_its_recipe(folder / "recipe.yaml", inputs, tmp_path)


def trained_by_its_recipe(path: Path, inputs: Path, tmp_path: Path) -> None:
    """The recipe of a winner whose layers differ prunes the same model without a search, and trains and exports it."""
    recipe = load_recipe(path)
    assert recipe.target.budgets == {}
    assert recipe.target.by_layer
    sections = recipe.model_dump(mode="json", include={"target", "search", "export"})
    sections["distill"] = {"tokens": 4 * 8 * 64, "validate_every": 4, "checkpoint_every": 0}
    [results] = run_on_ranks(1, run_with_failures, tmp_path / "again", inputs, "export", sections, None)
    assert "search" not in results
    mine, other = weights(tmp_path / "again", "prune"), weights(tmp_path / "run", "prune")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert (results["distill"]["steps"], results["distill"]["skipped_steps"]) == (4, 0)
    student = open_checkpoint(tmp_path / "again/stages/distill/student").spec
    assert student.layers == PruningPlan.load(tmp_path / "run/stages/search/plan.json").student.layers
    assert len(set(student.layers)) > 1


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["TP2", "PP2", "DP2"])
def test_the_race_is_the_same_at_every_layout(run, inputs, tmp_path, parallel):
    folder, *_ = run
    changes = {**settings(), "parallel": parallel}
    first, second = run_on_ranks(2, run_with_failures, tmp_path / "run", inputs, "search", changes, None)
    assert first["search"] == second["search"]
    mine, other = (
        [json.loads(line) for line in (place / "stages/search/measured.jsonl").read_text().splitlines()]
        for place in (folder, tmp_path / "run")
    )
    keys = ("candidate", "rung", "seed")
    losses = [{tuple(row[key] for key in keys): row.get("loss") for row in rows} for rows in (mine, other)]
    assert losses[0].keys() == losses[1].keys()
    failed = [{key for key, loss in each.items() if loss is None} for each in losses]
    assert failed[0] == failed[1]
    measured = [{key: loss for key, loss in each.items() if loss is not None} for each in losses]
    assert measured[1] == pytest.approx(measured[0], abs=2e-3)


def test_groups_of_ranks_measure_what_one_measures_alone(run, inputs, tmp_path):
    """Two processes, each with its own candidate: cut off in the middle, gone on with, and the same to the last bit."""
    alone, expected, _ = run
    folder, job = tmp_path / "run", (run_with_failures, tmp_path / "run", inputs, "search", settings())
    with pytest.raises(RankError, match=r"LostRankError: (another group .* ended: rank [01]: CutOff|rank 1 lost)"):
        run_on_ranks(2, connecting_themselves, free_port(), *job, 1)
    partial = folder / "stages/.search.partial"
    before = [row for path in partial.glob("measured*.jsonl") for row in read_rows(path)]
    assert {row["rank"] for row in before} == {0, 1}
    assert sum(row["rung"] > 0 for row in before) >= 1
    first, second = run_on_ranks(2, connecting_themselves, free_port(), *job, None)
    assert first["search"] == second["search"]
    assert first["search"]["winner"] == expected["search"]["winner"]
    assert first["search"]["failed"] == expected["search"]["failed"]
    assert not list((folder / "stages/search").glob("measured.rank*"))
    rows = read_rows(folder / "stages/search/measured.jsonl")
    keys = [(row["candidate"], row["rung"], row["seed"]) for row in rows]
    assert len(set(keys)) == len(keys), "nothing was measured twice"
    assert all(row in rows for row in before), "and nothing again"
    theirs = read_rows(alone / "stages/search/measured.jsonl")
    losses = [
        {(row["candidate"], row["rung"], row["seed"]): row["loss"] for row in each if "loss" in row}
        for each in (rows, theirs)
    ]
    assert losses[0] == losses[1]
