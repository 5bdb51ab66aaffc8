import math

import pytest
import torch

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import (
    Divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    total_variation,
)
from tests.oracles import divergence as oracle
from tests.tolerances import TOL

DIVERGENCES = {
    "forward": (forward_kl, oracle.kl),
    "reverse": (reverse_kl, lambda t, s: oracle.kl(s, t)),
    "js": (jensen_shannon, lambda t, s: oracle.jensen_shannon(t, s, 0.5)),
    "js 0.1": (lambda s, t: jensen_shannon(s, t, beta=0.1), lambda t, s: oracle.jensen_shannon(t, s, 0.1)),
    "skewed": (lambda s, t: skewed_kl(s, t, skew=0.3), lambda t, s: oracle.divergence("skewed_kl", t, s, skew=0.3)),
    "skewed reverse": (
        lambda s, t: skewed_reverse_kl(s, t, skew=0.3),
        lambda t, s: oracle.divergence("skewed_reverse_kl", t, s, skew=0.3),
    ),
    "total variation": (total_variation, lambda t, s: oracle.divergence("total_variation", t, s)),
}


def logits(seed, tokens=7, vocabulary=11):
    return 3 * torch.randn(tokens, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_matches_the_oracle(name):
    ours, reference = DIVERGENCES[name]
    student, teacher = logits(0), logits(1)
    got = ours(student.log_softmax(-1), teacher.log_softmax(-1))
    expected = [
        reference(oracle.softmax(t), oracle.softmax(s)) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **TOL[torch.float64])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_zero_only_at_equality(name):
    ours, _ = DIVERGENCES[name]
    same = logits(0).log_softmax(-1)
    torch.testing.assert_close(ours(same, same), torch.zeros(7, dtype=torch.float64), **TOL[torch.float64])
    assert (ours(same, logits(2).log_softmax(-1)) > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_ignores_a_shift_of_the_logits(name):
    ours, _ = DIVERGENCES[name]
    student, teacher = logits(0), logits(1)
    shifted = ours((student + 100).log_softmax(-1), (teacher - 50).log_softmax(-1))
    expected = ours(student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(shifted, expected, **TOL[torch.float64])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_gradient(name):
    ours, _ = DIVERGENCES[name]
    inputs = (logits(0, 2, 5).requires_grad_(), logits(1, 2, 5).requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: ours(s.log_softmax(-1), t.log_softmax(-1)), inputs)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_impossible_tokens_change_neither_value_nor_gradient(name):
    ours, _ = DIVERGENCES[name]

    def run(width):
        pair = [torch.nn.functional.pad(logits(seed), (0, width), value=-math.inf).requires_grad_() for seed in (0, 1)]
        value = ours(*(x.log_softmax(-1) for x in pair))
        return value.detach(), [g[:, :11] for g in torch.autograd.grad(value.sum(), pair)]

    value, gradients = run(4)
    expected, expected_gradients = run(0)
    torch.testing.assert_close(value, expected, **TOL[torch.float64])
    torch.testing.assert_close(gradients, expected_gradients, **TOL[torch.float64])


def test_forward_kl_is_infinite_where_the_student_excludes_a_possible_token():
    student = torch.tensor([0.0, -math.inf])
    assert forward_kl(student, torch.tensor([0.5, 0.5]).log()) == math.inf
    assert reverse_kl(student, torch.tensor([0.5, 0.5]).log()) == pytest.approx(math.log(2))


def test_js_is_symmetric_and_bounded_and_tends_to_kl():
    student, teacher = (logits(seed).log_softmax(-1) for seed in (0, 1))
    torch.testing.assert_close(jensen_shannon(student, teacher), jensen_shannon(teacher, student))
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert jensen_shannon(apart[0], apart[1]) == pytest.approx(math.log(2))
    limit = jensen_shannon(student, teacher, beta=1e-9) / 1e-9
    torch.testing.assert_close(limit, forward_kl(student, teacher), rtol=1e-4, atol=1e-4)  # first order in beta


def test_skewed_divergences_are_bounded_and_tend_to_the_plain_ones():
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    for skewed, plain in ((skewed_kl, forward_kl), (skewed_reverse_kl, reverse_kl)):
        assert skewed(apart[0], apart[1], skew=0.25) == pytest.approx(math.log(4))
        student, teacher = (logits(seed).log_softmax(-1) for seed in (0, 1))
        torch.testing.assert_close(skewed(student, teacher, skew=1e-9), plain(student, teacher), rtol=1e-5, atol=1e-5)
    assert total_variation(apart[0], apart[1]) == 1


@pytest.mark.parametrize("kind", DivergenceKind)
def test_a_divergence_by_name_carries_its_temperature(kind):
    student, teacher = logits(0), logits(1)
    divergence = Divergence(kind=kind, temperature=2.0, beta=0.2, skew=0.3)
    got = divergence.per_token((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1))
    expected = [
        4 * oracle.divergence(kind, oracle.softmax(t, 2.0), oracle.softmax(s, 2.0), beta=0.2, skew=0.3)
        for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **TOL[torch.float64])
