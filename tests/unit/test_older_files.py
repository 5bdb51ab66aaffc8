"""Files that earlier versions wrote are read: scores, plans, and checkpoints of every format."""

import json
from pathlib import Path

import pytest
import torch

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores
from tests.support.scores import sums

OLDER = Path(__file__).parents[1] / "compat" / "older_files"
CHECKPOINTS = ("student.nemo", "student_hf", "student_nemo2", "student_megatron")
TEACHER = ModelSpec(
    vocab_size=16,
    hidden_size=8,
    head_dim=4,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=6),) * 3,
    max_position_embeddings=32,
)
TARGETS = {
    "plan.json": TargetConfig(num_layers=2, hidden_size=6, ffn_hidden_size=4, num_attention_heads=2),
    "plan_merging.json": TargetConfig(num_attention_heads=2, merge_head_residuals=True),
}


def test_scores() -> None:
    scores = Scores.load(OLDER / "scores.safetensors")
    assert scores.spec == TEACHER
    assert scores.tensors.keys() == sums(TEACHER)[0].keys()
    assert all(torch.equal(scores.tensors[name], value) for name, value in sums(TEACHER)[0].items())


@pytest.mark.parametrize("name", TARGETS)
def test_plans(name: str) -> None:
    """An older plan is the decision that its scores still lead to, and is written again without the family."""
    plan = PruningPlan.load(OLDER / name)
    again = build_plan(Scores.load(OLDER / "scores.safetensors"), TARGETS[name], TEACHER)
    assert plan.digest() == again.digest()
    older = json.loads((OLDER / name).read_text())
    assert older["spec"].pop("family") == "mistral"
    assert json.loads(json.dumps(plan.to_dict())) == older


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str) -> None:
    """The family comes from the file: what a model computes would say Llama."""
    source = open_checkpoint(OLDER / name)
    plan = PruningPlan.load(OLDER / "plan.json")
    assert source.family == "mistral"
    assert source.spec == plan.student
    assert PruningPlan.of_checkpoint(OLDER / name).digest() == plan.digest()
    first = open_checkpoint(OLDER / CHECKPOINTS[0])
    assert all(torch.equal(source.get(weight), first.get(weight)) for weight in first.names())
    assert source.lineage["base_model"] == "someone/tiny"
    assert len(source.lineage["pruned"]) == 1


def test_an_older_student_is_pruned_further_and_traced() -> None:
    source = open_checkpoint(OLDER / "student.nemo")
    pruned = PrunedSource(source, PruningPlan.keep_all(source.spec))
    assert pruned.family == "mistral"
    assert pruned.tokenizer_files() == source.tokenizer_files()
