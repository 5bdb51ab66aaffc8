"""Complete runs from the command line: a hybrid of Mamba and attention, and layers whose attention alone goes."""

import json
import subprocess
from pathlib import Path

import pytest

from nemo_minitron.arch.layer import Mamba
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.open import open_checkpoint
from tests.support import runs
from tests.support.runs import command, environment
from tests.tiny import NEMOTRON_3_PATTERN, write_bamba, write_corpus, write_nemotron_h

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "recipes/tiny/hybrid_cpu.yaml"
EXPERTS_RECIPE = RECIPE.with_name("hybrid_experts_cpu.yaml")
llama = runs.inputs


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    write_nemotron_h(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    return [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]"]


@pytest.fixture(scope="module")
def hybrid_experts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("hybrid_experts")
    write_nemotron_h(folder / "hf", pattern=NEMOTRON_3_PATTERN, trained_steps=100)
    write_corpus(folder / "corpus")
    return [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]"]


@pytest.fixture(scope="module")
def bamba(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bamba")
    write_bamba(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    return [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]", "target.num_layers=4"]


def finished(run: Path, inputs: list[str], recipe: Path) -> dict:
    done = subprocess.run(command(run, inputs, recipe), capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "summary.json").read_text())


def test_a_hybrid_from_text_to_an_exported_student(hybrid: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = finished(run, hybrid, RECIPE)
    assert summary["perplexity"]["distilled"] < summary["perplexity"]["pruned"]
    student = open_checkpoint(run / "stages/export/tiny_hybrid_hf").spec
    assert (student.num_layers, student.hidden_size) == (7, 48)
    mixers = [layer.mixer for layer in student.layers if isinstance(layer.mixer, Mamba)]
    assert {(mixer.mamba_num_heads, mixer.mamba_head_dim, mixer.mamba_num_groups) for mixer in mixers} == {(4, 6, 4)}
    assert student == open_checkpoint(run / "stages/export/tiny_hybrid.nemo").spec
    exported = json.loads((run / "stages/export/result.json").read_text())
    assert set(exported["largest_logit_difference"]) == {"nemo", "hf"}
    report = (run / "report.html").read_text()
    for words in ("Mamba heads", "Mamba head size", "FFN size"):
        assert words in report


def test_a_hybrid_with_experts_from_text_to_an_exported_student(hybrid_experts: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    routers = ["distill.router_weight=0.2", "distill.balance_weight=0.01"]
    summary = finished(run, [*hybrid_experts, *routers], EXPERTS_RECIPE)
    assert summary["perplexity"]["distilled"] < summary["perplexity"]["pruned"]
    student = open_checkpoint(run / "stages/export/tiny_hybrid_experts_hf")
    assert (student.family, student.spec.hidden_size) == ("nemotron_h", 48)
    assert student.spec.kinds == {"mamba": 3, "attention": 2, "mlp": 1, "moe": 2}
    experts = {layer.moe for layer in student.spec.layers if layer.has_experts}
    assert {(each.num_experts, each.expert_ffn_hidden_size, each.shared_ffn_hidden_size) for each in experts} == {
        (4, 16, 32)
    }
    assert student.spec == open_checkpoint(run / "stages/export/tiny_hybrid_experts.nemo").spec
    exported = json.loads((run / "stages/export/result.json").read_text())
    assert set(exported["largest_logit_difference"]) == {"nemo", "hf"}
    report = (run / "report.html").read_text()
    for words in ("Mamba heads", "MoE layers", "experts", "shared expert FFN size", "active parameters"):
        assert words in report
    card = (run / "stages/export/tiny_hybrid_experts_hf/README.md").read_text()
    for words in ("active parameters", "nobody has tried that"):
        assert words in card


def test_a_budget_of_a_hybrid_becomes_a_student_within_it(hybrid: list[str], tmp_path: Path) -> None:
    """Every candidate is cut and measured, and what the search counted is what is pruned."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "mamba_num_heads", "mamba_head_dim")
    asked = [
        *(f"target.{name}=null" for name in names),
        *("target.params=125K", "target.ssm_state=11500", "search.candidates=3", "search.samples=2"),
        *("search.space.hidden_size=[48]", "search.rungs=[{candidates: 1, tokens: 512}]"),
    ]
    run = tmp_path / "run"
    done = subprocess.run(
        [*command(run, [*hybrid, *asked], RECIPE), "--to", "prune"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "stages/search/candidates.json").read_text())
    assert all(row["failed"] == "" and row["loss_pruned"] > 0 for row in found["candidates"])
    assert all(row["params"] <= 125_000 and row["ssm_state"] <= 11_500 for row in found["candidates"])
    (winner,) = (row for row in found["candidates"] if row["name"] == found["winner"])
    student = open_checkpoint(run / "stages/prune/student").spec
    assert student.kinds == {kind: winner[f"num_{kind}_layers"] for kind in ("mamba", "attention", "mlp")}
    assert parameter_count(student) == winner["params"]


def test_a_hybrid_with_an_mlp_in_every_layer_from_text_to_an_exported_student(bamba: list[str], tmp_path: Path) -> None:
    refused = subprocess.run(
        command(tmp_path / "refused", [*bamba, "target.mamba_head_dim=14"], RECIPE),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert refused.returncode == 2
    assert "cannot have 4 Mamba heads of 14 channels with hidden_size = 48" in refused.stderr
    assert not (tmp_path / "refused" / "stages").exists()
    run = tmp_path / "run"
    summary = finished(run, [*bamba, "target.mamba_head_dim=12"], RECIPE)
    assert summary["perplexity"]["distilled"] < summary["perplexity"]["pruned"]
    student = open_checkpoint(run / "stages/export/tiny_hybrid_hf")
    assert (student.family, student.spec.num_layers, student.spec.hidden_size) == ("bamba", 4, 48)
    assert student.spec == open_checkpoint(run / "stages/export/tiny_hybrid.nemo").spec


def test_attention_alone_goes_out_of_the_layer_that_needs_it_least(llama: list[str], tmp_path: Path) -> None:
    asked = [
        "score.sublayers=true",
        "target.drop_mixers=1",
        "target.drop_feed_forwards=1",
        "target.sublayer_metric=lm_loss",
        "target.num_layers=4",
    ]
    refused = subprocess.run(
        command(tmp_path / "refused", [*llama, *asked], runs.RECIPE),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert refused.returncode == 2
    assert "LlamaForCausalLM does not compute layers of" in refused.stderr
    assert not (tmp_path / "refused" / "stages").exists()
    run = tmp_path / "run"
    summary = finished(run, [*llama, *asked, "export.formats=[nemo]"], runs.RECIPE)
    assert summary["perplexity"]["distilled"] < summary["perplexity"]["pruned"]
    spec = open_checkpoint(run / "stages/export/tiny.nemo").spec
    assert sorted(len(layer.parts) for layer in spec.layers) == [1, 1, 2, 2]
    assert sum(layer.mixer is None for layer in spec.layers) == 1
