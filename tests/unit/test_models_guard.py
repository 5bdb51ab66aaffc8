"""The guard's judgement, step by step."""

import math

import pytest

from nemo_minitron.config.training import GuardConfig
from nemo_minitron.errors import TrainingError
from nemo_minitron.models.guard import WARM, StepGuard


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf), (math.nan, math.nan)]
)
def test_what_is_not_finite_is_refused(loss, norm):
    guard = StepGuard(GuardConfig())
    assert guard.refuses(loss, norm)
    assert not guard.refuses(2.0, 1.0)
    assert guard.skipped == 1


def test_a_spike_is_measured_against_the_median_of_accepted_steps():
    guard = StepGuard(GuardConfig(spike_factor=4.0))
    assert not guard.refuses(2.0, 1000.0), "the first steps say nothing yet"
    for norm in range(1, WARM + 1):
        assert not guard.refuses(2.0, float(norm))
    # Accepted so far: 1 to 8 and 1000, whose median is 5.
    assert not guard.refuses(2.0, 20.0)
    assert guard.refuses(2.0, 22.1)  # the median is now 5.5
    assert guard.refuses(2.0, 22.1), "what was refused does not become usual"
    assert guard.skipped == 2


def test_without_a_factor_no_finite_step_is_refused():
    guard = StepGuard(GuardConfig())
    assert not any(guard.refuses(1.0, 10.0**power) for power in range(30))


def test_other_ranks_can_say_no():
    guard = StepGuard(GuardConfig(spike_factor=4.0))
    for _ in range(WARM):
        guard.refuses(2.0, 1.0)
    assert guard.refuses(2.0, 3.9, agree=lambda mine: False)


def test_too_many_in_a_row_end_training_with_the_reason():
    guard = StepGuard(GuardConfig(max_consecutive_skips=3))
    for loss in (math.nan, math.nan, 2.0, math.nan, math.nan):
        guard.refuses(loss, 1.0)
        guard.check()
    guard.refuses(2.0, math.inf)
    with pytest.raises(TrainingError, match=r"3 training steps in a row were skipped.*gradient norm is inf"):
        guard.check()


def test_a_resumed_guard_judges_alike():
    first, second = StepGuard(GuardConfig(spike_factor=2.0)), StepGuard(GuardConfig(spike_factor=2.0))
    for norm in (1.0,) * 40:
        first.refuses(2.0, norm)
    first.refuses(math.nan, 1.0)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.refuses(2.0, 2.1)
    assert second.skipped == 2
