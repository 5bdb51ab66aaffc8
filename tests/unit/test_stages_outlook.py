"""When a run will end: budgets, what was timed, and what a recipe asks for."""

from pathlib import Path

import pytest

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.outlook import EFFICIENCY, Outlook
from nemo_minitron.stages.run_folder import RunFolder
from tests.jobs import config_for

TEACHER = ModelSpec(
    family="llama",
    vocab_size=256,
    hidden_size=64,
    head_dim=8,
    layers=(LayerSpec(num_attention_heads=8, num_query_groups=4, ffn_hidden_size=96),) * 4,
    max_position_embeddings=512,
)
# Of one token: q and output projection 2 x 64 x 64, k and v 2 x 64 x 32, three FFN matrices 64 x 96, four layers;
# the output layer; attention over 32 positions in 8 heads of 8 channels.
FORWARD = 2 * (4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 256 * 64) + 4 * 4 * 64 * 64 / 2
RATE = 1e6


@pytest.fixture
def imported(tmp_path, monkeypatch) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.begin("import", {})
    run.finish("import", {}, {"spec": TEACHER.to_dict()})
    monkeypatch.setattr("nemo_minitron.ops.product_speed.product_rate", lambda *_: RATE / EFFICIENCY)
    return run


def outlook(run: RunFolder, *names: str, **changes) -> Outlook:
    config = config_for(Path("hf"), Path("corpus"), precision="fp32", **changes)
    return Outlook(config, run, [stage for stage in chain_for(config) if stage.name in names], ranks=1)


def test_nothing_is_said_before_the_model_is_known(tmp_path):
    assert outlook(RunFolder(tmp_path / "new"), "import", "score").seconds() is None


def test_scoring_takes_its_operations_at_the_measured_rate(imported):
    score = {"samples": 16, "sequence_length": 64}
    expected = 16 * 64 * FORWARD / RATE
    assert outlook(imported, "score", score=score).seconds() == pytest.approx(expected)


def test_a_budget_is_taken_at_its_word(imported):
    batch = {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 8}
    assert outlook(imported, "distill", distill={"minutes": 5.5, "batch": batch}).seconds() == pytest.approx(330)


def test_what_a_stage_took_tells_the_rate_of_those_after_it(imported):
    ahead = outlook(imported, "score", "evaluate", target={}, score={"samples": 16, "sequence_length": 64})
    ahead.finished("score", seconds=16 * 64 * FORWARD / 4e6)
    # Teacher, pruned and distilled, all of one size.
    assert ahead.seconds() == pytest.approx(3 * 1024 * FORWARD / 4e6)


def test_a_training_by_budget_tells_no_rate(imported):
    batch = {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 8}
    ahead = outlook(imported, "distill", "evaluate", target={}, distill={"minutes": 1, "batch": batch})
    ahead.finished("distill", seconds=60)
    assert ahead.seconds() == pytest.approx(3 * 1024 * FORWARD / RATE)
