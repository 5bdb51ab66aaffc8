import math

import pytest
import torch

from nemo_minitron.config.objective import HiddenLossKind
from nemo_minitron.ops.hidden_loss import cosine_distance, dynamic_weight, hidden_loss, mean_squared_error
from tests.tolerances import TOL

TOKENS, WIDTH, TEACHER_WIDTH = 11, 4, 6


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    keep = torch.arange(TOKENS) % 3 != 1
    return normal(TOKENS, WIDTH), normal(TOKENS, TEACHER_WIDTH), keep, normal(TEACHER_WIDTH, WIDTH)


def oracle(kind, student, teacher, keep, projection):
    """Token by token in Python floats."""
    total = 0.0
    for s, t, kept in zip(student.tolist(), teacher.tolist(), keep.tolist(), strict=True):
        if not kept:
            continue
        mapped = [sum(w * x for w, x in zip(row, s, strict=True)) for row in projection.tolist()]
        if kind == "mse":
            total += sum((a - b) ** 2 for a, b in zip(mapped, t, strict=True)) / len(t)
        else:
            total += 1 - sum(a * b for a, b in zip(mapped, t, strict=True)) / (math.hypot(*mapped) * math.hypot(*t))
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", HiddenLossKind)
def test_hidden_loss_matches_the_oracle(kind, dtype):
    data = problem(dtype)
    found = hidden_loss(*data, kind=kind)
    assert found.item() == pytest.approx(oracle(kind, *data), rel=TOL[dtype]["rtol"])


@pytest.mark.parametrize("kind", HiddenLossKind)
def test_hidden_loss_gradients(kind):
    student, teacher, keep, projection = problem()
    inputs = student.requires_grad_(), projection.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, p: hidden_loss(s, teacher, keep, p, kind=kind), inputs)


@pytest.mark.parametrize("kind", HiddenLossKind)
def test_parts_of_a_sequence_add_up_in_value_and_gradient(kind):
    def run(*parts):
        student, teacher, keep, projection = problem()
        student.requires_grad_()
        projection.requires_grad_()
        total = sum(hidden_loss(student[p], teacher[p], keep[p], projection, kind=kind) for p in parts)
        total.backward()
        return total.detach(), student.grad, projection.grad

    # The middle part keeps no token at all.
    torch.testing.assert_close(run(slice(0, 1), slice(1, 2), slice(2, TOKENS)), run(slice(None)), **TOL[torch.float64])


@pytest.mark.parametrize("kind", HiddenLossKind)
def test_nothing_kept_and_masked_garbage(kind):
    student, teacher, keep, projection = problem()
    clean = hidden_loss(student, teacher, keep, projection, kind=kind)
    student[~keep] = teacher[~keep] = torch.nan
    student.requires_grad_()
    projection.requires_grad_()
    dirty = hidden_loss(student, teacher, keep, projection, kind=kind)
    torch.testing.assert_close(dirty.detach(), clean)
    dirty.backward()
    assert student.grad.isfinite().all()
    assert projection.grad.isfinite().all()
    student.grad = projection.grad = None
    nothing = hidden_loss(student, teacher, torch.zeros(TOKENS), projection, kind=kind)
    nothing.backward()
    assert nothing.item() == 0
    assert not student.grad.any()
    assert not projection.grad.any()


def test_equal_states_have_no_loss_and_cosine_ignores_length():
    _, teacher, keep, _ = problem()
    for kind in HiddenLossKind:
        assert hidden_loss(teacher, teacher, keep, kind=kind).item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(cosine_distance(teacher * 7, -teacher), torch.full((TOKENS,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(mean_squared_error(teacher + 3, teacher), torch.full((TOKENS,), 9.0).double())
    assert cosine_distance(torch.zeros(3), torch.ones(3)).item() == 1


def test_dynamic_weight_balances_without_a_gradient():
    kd, hidden = torch.tensor(6.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    weight = dynamic_weight(kd, hidden)
    assert weight.item() == 4
    (kd + weight * hidden).backward()
    assert (kd.grad.item(), hidden.grad.item()) == (1, 4)
    assert dynamic_weight(kd, torch.tensor(0.0)).item() == 0
