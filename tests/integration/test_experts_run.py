"""A mixture of experts through all stages: on one rank, and with its experts, layers, rows and samples on two."""

import json
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoints.hf import open_hf
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.pruning.plan import PruningPlan
from tests.support.expert_models import write_experts
from tests.support.runs import command, environment, training_rows, weights
from tests.tiny import write_corpus

RECIPE = Path(__file__).parents[2] / "recipes/tiny/experts_cpu.yaml"
LAYOUTS = {
    "EP2": ("parallel.expert=2",),
    "TP2": ("parallel.tensor=2",),
    "PP2": ("parallel.pipeline=2",),
    "DP2": (),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_experts(folder / "hf", "qwen2_moe", trained_steps=100)
    write_corpus(folder / "corpus")
    return folder


@cache
def _run(root: Path, name: str) -> Path:
    """The complete chain on one rank, or up to distillation on two; routers are compared and balanced too."""
    run = root / name
    inputs = [f"model.source={root / 'hf'}", f"data.sources=[{root / 'corpus'}]"]
    extra = [] if name == "one" else ["--nproc", "2", "--to", "distill"]
    routers = ["distill.router_weight=0.2", "distill.balance_weight=0.05"]
    line = [*command(run, [*inputs, *routers, *LAYOUTS.get(name, ())], RECIPE), *extra]
    finished = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    assert finished.returncode == 0, finished.stderr
    return run


def test_a_chain_on_one_rank(root: Path) -> None:
    run = _run(root, "one")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["perplexity"]["distilled"] < summary["perplexity"]["pruned"]
    exported = run / "stages/export/tiny_experts_hf"
    student = open_hf(exported)
    experts = student.spec.layer.moe
    assert (experts.num_experts, experts.expert_ffn_hidden_size, experts.top_k) == (4, 16, 2)
    assert student.spec == open_checkpoint(run / "stages/distill/student").spec
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.num_experts == 4
    report = (run / "report.html").read_text()
    assert "active parameters" in report
    assert "expert FFN size" in report


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_on_two_ranks_are_those_of_one(layout: str, root: Path) -> None:
    alone, spread = _run(root, "one"), _run(root, layout)
    plans = [PruningPlan.load(run / "stages/prune/plan.json") for run in (alone, spread)]
    assert plans[0].digest() == plans[1].digest()
    for key in ("train/loss", "train/router"):
        losses = [[row[key] for row in training_rows(run)] for run in (alone, spread)]
        assert len(losses[0]) == len(losses[1]) == 20
        assert 0 < losses[0][-1] < losses[0][0]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    balance = [[row["train/balance"] for row in training_rows(run)] for run in (alone, spread)]
    assert min(balance[0]) > 1
    assert balance[1] == pytest.approx(balance[0], rel=1e-5)
    expected = weights(alone)
    for name, tensor in weights(spread).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
