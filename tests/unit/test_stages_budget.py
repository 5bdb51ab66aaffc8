"""A time budget as a number of steps, and how long what is left is said to take."""

import json

import pytest

from nemo_minitron.callbacks import reporter
from nemo_minitron.callbacks.reporter import Progress
from nemo_minitron.config.base import in_steps
from nemo_minitron.config.load import check, load_recipe
from nemo_minitron.config.training import DEFAULT_TOKENS, CorrectConfig, DistillConfig, OptimizerConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.stages import budget
from nemo_minitron.stages.budget import Costs, Given

COSTS = Costs(step=1.0, validation=2.0, checkpoint=3.0, start=5.0)


def settings(**values) -> DistillConfig:
    batch = {"sequence_length": 4, "global_batch_size": 2, "micro_batch_size": 1}
    return check(DistillConfig, {"batch": batch, **values}, source="recipe")


def own(asked: DistillConfig) -> Given:
    """The stage's own budget."""
    return Given.of(asked, None, key="distill")


def by_counting(steps: int, *, validate_every: int, checkpoint_every: int) -> float:
    """The same training, one event after the other."""
    seconds = 5.0 + 2.0
    validated = 0
    for step in range(1, steps + 1):
        seconds += 1.0
        if step % validate_every == 0:
            seconds, validated = seconds + 2.0, step
        if checkpoint_every and step % checkpoint_every == 0:
            seconds += 3.0
    if validated != steps:
        seconds += 2.0
    return seconds + 1.0


@pytest.mark.parametrize("minutes", [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(("validate", "checkpoint"), [(10, 20), (7, 0), (1000, 5)])
def test_as_many_steps_as_fit(minutes, validate, checkpoint):
    asked = settings(minutes=minutes, validate_every=validate, checkpoint_every=checkpoint)
    fixed = budget.fitting(asked, COSTS, own(asked), seconds=60 * minutes)
    times = {
        n: by_counting(n, validate_every=validate, checkpoint_every=checkpoint) for n in (fixed.steps, fixed.steps + 1)
    }
    assert times[fixed.steps] <= 60 * minutes < times[fixed.steps + 1]
    assert COSTS.of(fixed) == pytest.approx(times[fixed.steps])
    assert (fixed.minutes, fixed.tokens) == (None, 8 * fixed.steps)


def test_a_budget_too_short_for_one_step_says_what_a_step_takes_and_the_least_budget():
    asked = settings(minutes=0.05, checkpoint_every=0)
    with pytest.raises(ConfigError) as caught:
        budget.fitting(asked, Costs(step=7.5, validation=0.5, checkpoint=0, start=1), own(asked), seconds=2.0)
    text = str(caught.value)
    assert "distill.minutes = 0.05" in text
    assert "7.5 s" in text
    assert "the least is 0.17 minutes" in text  # 1 s gone, and start, two validations and a step: 10.5 s in all


def test_what_other_stages_leave_of_the_runs_time():
    asked = settings(minutes=9, minutes_of="run", validate_every=0, checkpoint_every=0)
    rest = Given.of(asked, 5.0, key="distill")
    assert rest.seconds == 300
    assert budget.fitting(asked, COSTS, rest, seconds=280).steps == 270  # 5 + 2 + 270 + 2 + 1
    assert not rest.notice


def test_a_training_takes_a_quarter_of_the_runs_time_even_if_nothing_is_left():
    asked = settings(minutes=9, minutes_of="run", validate_every=0, checkpoint_every=0)
    late = Given.of(asked, -1.0, key="distill")
    assert late.seconds == 135
    assert "distill.minutes = 9 for the complete run, 10 for other stages" in late.notice
    assert "distill takes 2 min 15 s" in late.notice
    with pytest.raises(ConfigError, match=r"the least is 9\.3 minutes"):  # 10 s too late already, and 11 s for one step
        budget.fitting(asked, COSTS, late, seconds=-10.0)


def test_trainings_that_share_a_runs_time_share_its_quarter():
    asked = settings(minutes=60, minutes_of="run", validate_every=0, checkpoint_every=0)
    share = Given.of(asked, 13.75, key="distill", trainings=4)
    assert share.seconds == 13.75 * 60
    assert not share.notice
    assert Given.of(asked, -1.0, key="distill", trainings=4).seconds == 60 * 60 / 4 / 4


def test_tokens_or_minutes():
    assert settings().tokens == DEFAULT_TOKENS
    assert settings(minutes=2.5).tokens is None
    with pytest.raises(ConfigError, match=r"tokens = 800 and minutes = 2\.5: give one of them"):
        settings(tokens=800, minutes=2.5)
    with pytest.raises(ConfigError, match="minutes"):
        settings(minutes=0)
    again = check(CorrectConfig, CorrectConfig(minutes=2.0).model_dump(mode="json"), source="resolved")
    assert (again.tokens, again.minutes) == (None, 2.0)


def test_the_command_lines_choice_replaces_the_recipes(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: x\nmodel: {source: m}\ndata: {sources: [t]}\ndistill: {minutes: 5}\ncorrect: {tokens: 9000}\n"
    )
    assert load_recipe(recipe).distill.minutes == 5
    changed = load_recipe(recipe, ["distill.tokens=8192", "correct.minutes=2"])
    assert (changed.distill.tokens, changed.distill.minutes) == (8192, None)
    assert (changed.correct.tokens, changed.correct.minutes) == (None, 2)
    with pytest.raises(ConfigError, match="tokens = 8192 and minutes = 5: give one of them"):
        load_recipe(recipe, ["distill.tokens=8192", "distill.minutes=5"])


def test_fractions_of_all_steps():
    fixed = settings(tokens=8 * 200, validate_every=0.25, checkpoint_every=0.5, optimizer={"warmup_steps": 0.05})
    assert (fixed.validation_interval, fixed.checkpoint_interval) == (50, 100)
    assert in_steps(fixed.optimizer.warmup_steps, fixed.steps) == 10
    assert settings(tokens=8, validate_every=0).validation_interval == 2
    for wrong in (1.5, -1, 1.0, True):
        with pytest.raises(ConfigError, match="fraction of all steps"):
            check(OptimizerConfig, {"warmup_steps": wrong}, source="recipe")


def test_what_was_fixed_is_kept(tmp_path):
    asked = settings(minutes=1.0, checkpoint_every=0, validate_every=0)
    assert budget.kept(tmp_path, asked) is None
    fixed = budget.fitting(asked, COSTS, own(asked), seconds=50)
    budget.keep(tmp_path, fixed, COSTS, own(asked))
    assert budget.kept(tmp_path, asked) == fixed
    record = json.loads((tmp_path / "budget.json").read_text())
    assert record["steps"] == fixed.steps == 40  # 5 + 2 + 40 + 2 + 1
    assert record["seconds_expected"] == 50.0


@pytest.mark.parametrize("first", [2.0, 30.0])
def test_the_second_line_says_the_time_that_is_left_within_15_percent(monkeypatch, first):
    """Steps of 3 s after a slow first one, a validation of 6 s after every tenth."""
    now = [100.0]
    monkeypatch.setattr(reporter.time, "monotonic", lambda: now[0])
    said = []
    progress = Progress(
        lambda shown: said.append((now[0], shown.seconds_left)), label="x", total=60, unit="steps", done=0
    )
    for step in range(60):
        now[0] += first if step == 0 else 3.0 * (0.95 if step % 2 else 1.05)
        progress.seconds_ahead = 6.0 * (6 - step // 10)
        progress.advance()
        if step % 10 == 9:
            now[0] += 6.0
            progress.pause(6.0)
    end = now[0]
    for moment, left in said[1:50]:
        assert left == pytest.approx(end - moment, rel=0.15)
