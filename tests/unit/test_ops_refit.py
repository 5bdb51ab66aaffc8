"""Refitting a linear map: against least squares written another way, and what must not change."""

import pytest
import torch

from nemo_minitron.ops.refit import refit_change

TOKENS, NEURONS, HIDDEN = 200, 12, 5
KEPT = torch.tensor([0, 1, 4, 5, 7, 9, 10])


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(TOKENS, NEURONS, generator=generator, dtype=torch.float64)
    a = a @ torch.randn(NEURONS, NEURONS, generator=generator, dtype=torch.float64)
    a *= torch.logspace(-4, 3, NEURONS, dtype=torch.float64)  # gated MLPs have such neurons
    weight = torch.randn(HIDDEN, NEURONS, generator=generator, dtype=torch.float64)
    added = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    return a, weight, added


def change(a, weight, added, kept=KEPT, ridge=0.3):
    return refit_change(weight, kept, a.T @ a, a.T @ added, ridge=ridge)


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 10.0])
def test_it_is_the_least_squares_solution_with_the_penalty_as_further_rows(drawn, ridge):
    a, weight, added = drawn
    kept = a[:, KEPT]
    missing = a @ weight.T + added - kept @ weight[:, KEPT].T
    rows = (ridge * kept.square().sum(0)).sqrt().diag()
    scale = kept.square().sum(0).rsqrt()  # lstsq alone would lose the small neurons
    left = torch.cat([kept, rows]) * scale
    expected = torch.linalg.lstsq(left, torch.cat([missing, torch.zeros(len(KEPT), HIDDEN, dtype=torch.float64)]))
    found = change(a, weight, added, ridge=ridge)
    torch.testing.assert_close(found / scale, expected.solution.T, rtol=1e-8, atol=1e-8)


def test_what_a_linear_map_can_do_is_done(drawn):
    a, weight, _ = drawn
    more = torch.ones(HIDDEN, len(KEPT), dtype=torch.float64)
    a[:, [i for i in range(NEURONS) if i not in KEPT]] = 0
    torch.testing.assert_close(change(a, weight, a[:, KEPT] @ more.T, ridge=1e-12), more, rtol=1e-4, atol=1e-4)


def test_keeping_all_with_nothing_to_add_changes_nothing(drawn):
    a, weight, added = drawn
    assert torch.equal(change(a, weight, added * 0, kept=torch.arange(NEURONS)), torch.zeros_like(weight))


def test_dropping_dead_neurons_changes_nothing_and_dead_neurons_that_stay_are_left_alone(drawn):
    a, weight, added = drawn
    a[:, [i for i in range(NEURONS) if i not in KEPT]] = 0
    assert change(a, weight, added * 0).abs().max() == 0
    a[:, KEPT[2]] = 0
    assert change(a, weight, added)[:, 2].abs().max() == 0
    assert change(a, weight, added)[:, :2].abs().min() > 0
