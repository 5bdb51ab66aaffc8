"""The demo's check for GPUs reads what a run really writes, and what the README really says."""

import pytest

from benchmarks.gpu.checks.demo import outcome, published
from benchmarks.gpu.recipe_run import Finished
from nemo_minitron.report.content import MODELS


def finished(student: float) -> Finished:
    values = dict.fromkeys(MODELS, 40.0) | {"distilled": student, "tuned": None}
    return Finished(summary={"perplexity": values}, seconds=60.0)


@pytest.mark.parametrize(("student", "met"), [(27.9, True), (28.2, False), (26.8, False)])
def test_a_student_is_held_against_the_one_of_a_cpu(student: float, met: bool) -> None:
    (target,) = outcome("bf16", finished(student), 27.52).targets
    assert target.met is met
    assert target.found == pytest.approx(abs(student - 27.52) / 27.52)


def test_the_readme_has_the_figures() -> None:
    perplexity, tokens = published()
    assert 20 < perplexity < 40
    assert tokens % 512 == 0
