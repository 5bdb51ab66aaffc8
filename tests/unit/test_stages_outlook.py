"""When a run will end: budgets, what was timed, and what a recipe asks for."""

from pathlib import Path

import pytest

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.outlook import EFFICIENCY, Outlook
from nemo_minitron.stages.run_folder import RunFolder
from tests.jobs import config_for

TEACHER = ModelSpec(
    vocab_size=256,
    hidden_size=64,
    head_dim=8,
    layers=(transformer_layer(num_attention_heads=8, num_query_groups=4, ffn_hidden_size=96),) * 4,
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
    run.finish("import", {}, {"spec": TEACHER.to_dict(), "seconds": 7.0})
    monkeypatch.setattr("nemo_minitron.ops.product_speed.product_rate", lambda *_: RATE / EFFICIENCY)
    return run


def outlook(run: RunFolder, *names: str, **changes) -> Outlook:
    config = config_for(Path("hf"), Path("corpus"), precision="fp32", **changes)
    chain = chain_for(config)
    return Outlook(config, run, [stage for stage in chain if stage.name in names], chain=chain, ranks=1)


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


BATCH = {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 8}
LATER = ("data", "score", "prune", "distill", "evaluate", "export", "report")
FAST = 1e8
# Reading texts, cutting, writing and the report, then scoring, then teacher, pruned and distilled on held-out text.
OTHERS = 8 + 6 + 10 + 5 + (16 * 64 + 3 * 1024) * FORWARD / FAST


@pytest.fixture
def fast(imported, monkeypatch) -> RunFolder:
    monkeypatch.setattr("nemo_minitron.ops.product_speed.product_rate", lambda *_: FAST / EFFICIENCY)
    return imported


def of_the_run(run: RunFolder, *names: str, **changes) -> tuple[Outlook, dict]:
    """An outlook on a recipe that takes nine minutes in all, and its stages by name."""
    settings = {"target": {}, "score": {"samples": 16, "sequence_length": 64}, **changes}
    distill = {"minutes": 9, "minutes_of": "run", "batch": BATCH}
    config = config_for(Path("hf"), Path("corpus"), precision="fp32", distill=distill, **settings)
    chain = chain_for(config)
    ahead = Outlook(config, run, [stage for stage in chain if stage.name in names], chain=chain, ranks=1)
    return ahead, {stage.name: stage for stage in chain}


def test_a_budget_of_the_run_leaves_a_training_what_the_other_stages_do_not_take(fast):
    ahead, stages = of_the_run(fast, *LATER)
    assert ahead.minutes_for(stages["score"]) is None
    assert 60 * ahead.minutes_for(stages["distill"]) == pytest.approx(540 - 7 - OTHERS)
    assert ahead.seconds() == pytest.approx(540 - 7)


def test_what_a_command_leaves_out_counts_too(fast):
    ahead, stages = of_the_run(fast, "data", "score", "prune", "distill")
    assert 60 * ahead.minutes_for(stages["distill"]) == pytest.approx(540 - 7 - OTHERS)


def test_a_stage_that_is_done_counts_with_its_time(fast):
    fast.begin("data", {})
    fast.finish("data", {}, {"seconds": 100.0})
    ahead, stages = of_the_run(fast, *LATER[1:])
    assert 60 * ahead.minutes_for(stages["distill"]) == pytest.approx(540 - 7 - 100 - (OTHERS - 8))


def test_rounds_share_the_time_of_the_run(fast):
    rounds = (f"{name}.1" for name in ("score", "prune", "distill"))
    ahead, stages = of_the_run(fast, *LATER, *rounds, rounds=2, target={"ffn_hidden_size": 48})
    first, last = (ahead.minutes_for(stages[name]) for name in ("distill.1", "distill"))
    assert first == last
    # Two rounds score and prune, the second with fewer neurons; what is evaluated after them has half as many.
    least = 540 - 7 - OTHERS - 6 - 16 * 64 * FORWARD / FAST
    assert least < 60 * (first + last) < least + 3 * 1024 * FORWARD / FAST
    assert ahead.seconds() == pytest.approx(540 - 7)


def test_a_training_takes_a_quarter_of_the_runs_time_even_if_it_is_gone(fast):
    fast.begin("data", {})
    fast.finish("data", {}, {"seconds": 600.0})
    ahead, stages = of_the_run(fast, *LATER[1:])
    assert ahead.minutes_for(stages["distill"]) < 0
    assert ahead.seconds() == pytest.approx(OTHERS - 8 + 540 / 4)


def test_a_training_that_is_done_tells_no_rate_and_leaves_the_rest(fast):
    ahead, _ = of_the_run(fast, *LATER)
    fast.begin("distill", {})
    fast.finish("distill", {}, {"seconds": 450.0})
    ahead.finished("distill", seconds=450.0)
    assert ahead.seconds() == pytest.approx(OTHERS)
