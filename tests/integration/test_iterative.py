"""Prune, distill, prune again: three rounds from the command line, undisturbed and killed in the second."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoints.open import open_checkpoint
from tests.support import runs as one_round
from tests.support.runs import environment, start, training_rows, wait_for, weights

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "recipes/tiny/iterative_cpu.yaml"
inputs = one_round.inputs


def finish(run: Path, inputs: list[str]) -> None:
    done = subprocess.run(
        one_round.command(run, inputs, recipe=RECIPE), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("iterative") / "run"
    finish(run, inputs)
    return run


def test_every_round_is_smaller_and_the_last_one_is_the_target(undisturbed):
    specs = [open_checkpoint(undisturbed / f"stages/{name}/student").spec for name in ("distill.1", "distill.2")]
    specs.append(open_checkpoint(undisturbed / "stages/distill/student").spec)
    # From 4 layers, hidden 64, 8 heads, FFN 96: (4 - i / 3, 64 - 16 i / 3, 8 - 4 i / 3, 96 - 32 i / 3), rounded.
    assert [found.num_layers for found in specs] == [4, 3, 3]
    assert [found.hidden_size for found in specs] == [60, 52, 48]
    assert [found.layers[0].mlp.ffn_hidden_size for found in specs] == [88, 72, 64]
    assert [found.layers[0].attention.num_attention_heads for found in specs] == [8, 4, 4]


def test_each_round_scores_the_model_it_finds_and_learns_from_the_teacher(undisturbed):
    done = {name: json.loads((undisturbed / f"stages/{name}/DONE").read_text()) for name in ("score", "distill.2")}
    assert set(done["score"]["upstream"]) == {"distill.2", "data"}
    assert set(done["distill.2"]["upstream"]) == {"import", "data", "prune.2"}


def test_report_tells_of_every_round(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    parameters = [row["parameters"] for row in summary["rounds"]]
    assert [summary["params"]["teacher"], *parameters] == sorted([summary["params"]["teacher"], *parameters])[::-1]
    assert parameters[-1] == summary["params"]["student"]
    assert summary["tokens"] == 3 * 5120
    assert all(row["kl"]["distilled"] < row["kl"]["pruned"] for row in summary["rounds"])
    assert len(summary["dropped_layers"]) == 1
    assert summary["perplexity"]["distilled"] < summary["perplexity"]["pruned"]
    assert {"score.1", "prune.2", "distill.1", "distill"} <= set(summary["seconds"])
    assert "Round by round" in (undisturbed / "report.html").read_text()
    assert {row["stage"] for row in training_rows(undisturbed)} == {"distill.1", "distill.2", "distill"}


def test_killed_in_the_second_round_the_same_command_finishes_with_the_same_weights(undisturbed, inputs, tmp_path):
    run = tmp_path / "run"
    process = start(run, inputs, recipe=RECIPE)
    # Ten steps a round; the fourteenth is the second round's fourth, one after its checkpoint.
    wait_for(lambda: len(training_rows(run)) >= 14, process)
    process.kill()
    process.communicate()
    assert (run / "stages/distill.1/DONE").is_file()
    assert not (run / "stages/distill.2").exists()
    finish(run, inputs)
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())
    assert len(training_rows(run)) == 30, "every step is logged once"
