"""The fused output layers against plain autograd on complete tensors, in value and in every gradient, at every world
size.

The reference is torch.nn.functional.kl_div and cross_entropy on one process in float64; it shares no code with ours.
"""

import math

import pytest
import torch
from torch import distributed
from torch.nn import functional

from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.parallel.fused_linear_cross_entropy import fused_linear_cross_entropy
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd
from tests.oracles import divergence as oracle
from tests.oracles.vocab import (
    mask_padding,
    top1_agreement,
    vocab_cross_entropy,
    vocab_divergence,
)
from tests.ranks import run_on_ranks
from tests.support.largest_tensor import LargestTensor
from tests.tolerances import TOL

TOKENS, HIDDEN, TEACHER_HIDDEN = 13, 6, 9
PADDED = 20
"""Columns of all ranks together. With 14 real tokens, the last of four ranks holds nothing but padding."""


def problem(dtype=torch.float64, vocab_size=14):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    keep = torch.rand(TOKENS, generator=generator) > 0.3
    labels = torch.randint(vocab_size, (TOKENS,), generator=generator)
    return {
        "student_hidden": normal(TOKENS, HIDDEN),
        "student_weight": normal(PADDED, HIDDEN),
        "teacher_hidden": normal(TOKENS, TEACHER_HIDDEN),
        "teacher_weight": normal(PADDED, TEACHER_HIDDEN),
        "keep": keep,
        "labels": labels,
    }


def reference_kl(data, vocab_size, temperature, scale=1.0, weights=(1.0, 0.0)):
    """Value, gradients of student states and weight, and the statistics, from complete float64 tensors."""
    hidden = data["student_hidden"].double().clone().requires_grad_()
    weight = data["student_weight"].double().clone().requires_grad_()
    keep, labels = data["keep"], data["labels"][data["keep"]]
    student = (hidden @ weight.t())[keep, :vocab_size]
    teacher = (data["teacher_hidden"].double() @ data["teacher_weight"].double().t())[keep, :vocab_size]
    log_q, log_p = (functional.log_softmax(x / temperature, -1) for x in (student, teacher))
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2
    loss = weights[0] * kl + weights[1] * functional.cross_entropy(student, labels, reduction="sum")
    (loss * scale).backward()
    return {
        "loss": loss.detach(),
        "kl": kl.detach(),
        "tokens": keep.sum(),
        "d_hidden": hidden.grad,
        "d_weight": weight.grad,
        "student_ce": functional.cross_entropy(student, labels, reduction="sum").detach(),
        "teacher_ce": functional.cross_entropy(teacher, labels, reduction="sum"),
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).sum().double(),
    }


def shard(weight, rank, world):
    return weight.chunk(world)[rank].clone()


def fused_on_rank(data, vocab_size, temperature, chunk_tokens, scale=1.0, weights=(1.0, 0.0)):  # noqa: PLR0917
    rank, world = distributed.get_rank(), distributed.get_world_size()
    tp = distributed.group.WORLD if world > 1 else None
    hidden = data["student_hidden"].clone().requires_grad_()
    weight = shard(data["student_weight"], rank, world).requires_grad_()
    before = [data[name].clone() for name in sorted(data)]
    loss = fused_linear_kd(
        hidden,
        weight,
        data["teacher_hidden"],
        shard(data["teacher_weight"], rank, world),
        data["keep"],
        data["labels"],
        divergence=Divergence(temperature=temperature),
        kd_weight=weights[0],
        lm_weight=weights[1],
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
        tp=tp,
        statistics=True,
    )
    (loss.loss_sum * scale).backward()
    assert all(torch.equal(a, data[name]) for a, name in zip(before, sorted(data), strict=True)), "an input was changed"
    return {
        "loss": loss.loss_sum.detach(),
        "kl": loss.kd_sum,
        "tokens": loss.tokens,
        "d_hidden": hidden.grad,
        "d_weight": weight.grad,
        "student_ce": loss.student_ce_sum,
        "teacher_ce": loss.teacher_ce_sum,
        "agreement": loss.top1_agreement,
    }


def dense_on_rank(data, vocab_size, temperature):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    tp = distributed.group.WORLD if world > 1 else None
    keep = data["keep"]
    student, teacher = (
        (data[f"{who}_hidden"] @ shard(data[f"{who}_weight"], rank, world).t())[keep] for who in ("student", "teacher")
    )
    student.requires_grad_()
    masked = [mask_padding(x, vocab_size=vocab_size, tp=tp) for x in (student, teacher)]
    kl = vocab_divergence(*masked, Divergence(temperature=temperature), tp=tp).sum()
    kl.backward()
    return {
        "kl": kl.detach(),
        "d_logits": student.grad,
        "student_ce": vocab_cross_entropy(masked[0], data["labels"][keep], tp=tp).sum().detach(),
        "agreement": top1_agreement(*masked, tp=tp).sum().double(),
    }


def every_case(cases):
    """One start of the ranks for all cases."""
    return [fused_on_rank(*case) for case in cases], [dense_on_rank(*case[:3]) for case in cases]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_fused_kl_equals_the_reference_in_value_and_gradient(world, dtype):
    if PADDED % world:
        pytest.skip("the padded vocabulary is a multiple of every world size")
    cases = [
        (problem(dtype, vocab_size), vocab_size, temperature, chunk, scale, weights)
        for vocab_size in (14, PADDED)
        for temperature, chunk, scale, weights in (
            (1.0, None, 1.0, (1.0, 0.0)),
            (2.5, 4, 0.3, (1.0, 0.0)),
            (1.0, 4, 1.0, (0.7, 0.3)),
            (2.5, None, 1.0, (0.0, 1.0)),
            (2.5, 4, 1.0, (0.5, 2.0)),
        )
    ]
    answers = run_on_ranks(world, every_case, cases)
    for index, (data, vocab_size, temperature, _, scale, weights) in enumerate(cases):
        expected = reference_kl(data, vocab_size, temperature, scale, weights)
        fused = [rank[0][index] for rank in answers]
        dense = [rank[1][index] for rank in answers]
        for answer in fused:
            for name in ("loss", "kl", "tokens", "d_hidden", "student_ce", "teacher_ce", "agreement"):
                torch.testing.assert_close(
                    answer[name], expected[name], check_dtype=False, **TOL[dtype], msg=name_of(name)
                )
        d_weight = torch.cat([answer["d_weight"] for answer in fused])
        torch.testing.assert_close(d_weight, expected["d_weight"], check_dtype=False, **TOL[dtype])
        assert not d_weight[vocab_size:].any(), "columns that pad the vocabulary received a gradient"
        for answer in dense:
            for name in ("kl", "student_ce", "agreement"):
                torch.testing.assert_close(
                    answer[name], expected[name], check_dtype=False, **TOL[dtype], msg=name_of(name)
                )
        if weights != (1.0, 0.0):
            continue
        d_logits = torch.cat([answer["d_logits"] for answer in dense], -1).double()
        d_hidden = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        d_hidden[data["keep"]] = d_logits @ data["student_weight"].double() * scale
        torch.testing.assert_close(d_hidden, expected["d_hidden"], **TOL[dtype])


def name_of(name):
    return lambda text: f"{name}: {text}"


def cross_entropy_on_rank(data, vocab_size, chunk_tokens):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    hidden = data["student_hidden"].clone().requires_grad_()
    weight = shard(data["student_weight"], rank, world).requires_grad_()
    tp = distributed.group.WORLD if world > 1 else None
    loss = fused_linear_cross_entropy(
        hidden, weight, data["labels"], data["keep"], vocab_size=vocab_size, chunk_tokens=chunk_tokens, tp=tp
    )
    loss.ce_sum.backward()
    return loss.ce_sum.detach(), loss.tokens, loss.correct, hidden.grad, weight.grad


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fused_cross_entropy_equals_the_reference(world, dtype):
    data, vocab_size = problem(dtype), 14
    hidden, weight = (data[f"student_{what}"].double().clone().requires_grad_() for what in ("hidden", "weight"))
    logits = (hidden @ weight.t())[data["keep"], :vocab_size]
    labels = data["labels"][data["keep"]]
    expected = functional.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    answers = run_on_ranks(world, cross_entropy_on_rank, data, vocab_size, 5)
    for ce_sum, tokens, correct, d_hidden, _ in answers:
        torch.testing.assert_close(ce_sum, expected.detach(), check_dtype=False, **TOL[dtype])
        torch.testing.assert_close(d_hidden, hidden.grad, check_dtype=False, **TOL[dtype])
        assert (tokens.item(), correct.item()) == (labels.numel(), (logits.argmax(-1) == labels).sum().item())
    d_weight = torch.cat([answer[-1] for answer in answers])
    torch.testing.assert_close(d_weight, weight.grad, check_dtype=False, **TOL[dtype])


def fused_alone(data, **changes):
    arguments = {"vocab_size": 14, **changes}
    keep = arguments.pop("keep", None)
    return fused_linear_kd(*(data[k] for k in list(data)[:4]), keep, **arguments)


def test_fused_kl_matches_the_loop_oracle():
    data = problem()
    student, teacher = (data[f"{who}_hidden"] @ data[f"{who}_weight"][:14].t() for who in ("student", "teacher"))
    for temperature in (1.0, 3.0):
        expected = temperature**2 * sum(
            oracle.kl(oracle.softmax(t, temperature), oracle.softmax(s, temperature))
            for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
        )
        got = fused_alone(data, divergence=Divergence(temperature=temperature), chunk_tokens=5).loss_sum.item()
        assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_gradcheck(chunk_tokens):
    data = problem()

    def kl(hidden, weight):
        rest = data["teacher_hidden"], data["teacher_weight"], data["keep"]
        return fused_linear_kd(
            hidden, weight, *rest, divergence=Divergence(temperature=1.7), vocab_size=14, chunk_tokens=chunk_tokens
        ).loss_sum

    def cross_entropy(hidden, weight):
        return fused_linear_cross_entropy(
            hidden, weight, data["labels"], data["keep"], vocab_size=14, chunk_tokens=chunk_tokens
        ).ce_sum

    inputs = (data["student_hidden"].requires_grad_(), data["student_weight"].requires_grad_())
    assert torch.autograd.gradcheck(kl, inputs)
    assert torch.autograd.gradcheck(cross_entropy, inputs)


def test_a_tied_weight_collects_both_gradients():
    data = problem()
    ids = torch.arange(TOKENS) % 14
    weight = data["student_weight"].clone().requires_grad_()
    fused_linear_kd(
        functional.embedding(ids, weight), weight, data["teacher_hidden"], data["teacher_weight"], vocab_size=14
    ).loss_sum.backward()
    twin = data["student_weight"].clone().requires_grad_()
    log_q = functional.log_softmax((functional.embedding(ids, twin) @ twin.t())[:, :14], -1)
    log_p = functional.log_softmax((data["teacher_hidden"] @ data["teacher_weight"].t())[:, :14], -1)
    functional.kl_div(log_q, log_p, log_target=True, reduction="sum").backward()
    torch.testing.assert_close(weight.grad, twin.grad, **TOL[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_given_buffer_collects_the_weight_gradient_of_several_micro_batches(dtype):
    data = problem(dtype)
    pair = data["student_hidden"].requires_grad_(), data["student_weight"].requires_grad_()
    teacher = data["teacher_hidden"], data["teacher_weight"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = torch.ones(PADDED, HIDDEN, dtype=wide)
    losses = {
        "kd": lambda **options: fused_linear_kd(*pair, *teacher, vocab_size=14, **options).loss_sum,
        "ce": lambda **options: fused_linear_cross_entropy(*pair, data["labels"], vocab_size=14, **options).ce_sum,
    }
    expected = torch.ones(PADDED, HIDDEN, dtype=wide)
    for loss in losses.values():
        for chunk_tokens in (None, 4):
            whole = torch.autograd.grad(loss(chunk_tokens=chunk_tokens), pair)
            expected += whole[1]
            value = loss(chunk_tokens=chunk_tokens, weight_gradient=buffer)
            found = torch.autograd.grad(value, pair, allow_unused=True)
            assert found[1] is None
            torch.testing.assert_close(found[0], whole[0])
    torch.testing.assert_close(buffer, expected, **TOL[dtype])
    with torch.no_grad():
        losses["kd"](weight_gradient=buffer)
    torch.testing.assert_close(buffer, expected, **TOL[dtype], msg="validation added something")
    with pytest.raises(ValueError, match="factor of 1, not 2"):
        (losses["kd"](weight_gradient=buffer) * 2).backward()


def test_nothing_kept_gives_zero_with_a_graph():
    data = problem()
    for name in ("student_hidden", "student_weight"):
        data[name].requires_grad_()
    keep = torch.zeros(TOKENS, dtype=torch.bool)
    kl = fused_alone(data, keep=keep)
    ce = fused_linear_cross_entropy(data["student_hidden"], data["student_weight"], data["labels"], keep, vocab_size=14)
    assert (kl.loss_sum.item(), kl.tokens.item(), ce.ce_sum.item(), ce.tokens.item()) == (0, 0, 0, 0)
    (kl.loss_sum + ce.ce_sum).backward()
    for name in ("student_hidden", "student_weight"):
        assert torch.equal(data[name].grad, torch.zeros_like(data[name]))


def test_masked_tokens_may_hold_anything():
    clean, dirty = problem(), problem()
    keep = clean["keep"]
    for name in ("student_hidden", "teacher_hidden"):
        dirty[name][~keep] = torch.nan
    values = []
    for data in (clean, dirty):
        data["student_hidden"].requires_grad_()
        loss = fused_alone(data, keep=keep)
        loss.loss_sum.backward()
        values.append((loss.loss_sum.detach(), data["student_hidden"].grad))
    torch.testing.assert_close(values[1], values[0], **TOL[torch.float64])
    assert not values[1][1][~keep].any()


def test_padded_columns_carry_no_probability():
    data = problem()
    expected = fused_alone(data).loss_sum
    for name in ("student_weight", "teacher_weight"):
        data[name][14:] = 1e3
    torch.testing.assert_close(fused_alone(data).loss_sum, expected, **TOL[torch.float64])


def test_equal_models_give_zero_loss_and_gradient():
    data = problem()
    hidden = data["student_hidden"].requires_grad_()
    weight = data["student_weight"]
    loss = fused_linear_kd(hidden, weight, hidden, weight, vocab_size=14, statistics=True)
    loss.loss_sum.backward()
    assert loss.loss_sum.item() == pytest.approx(0, abs=1e-12)
    assert loss.top1_agreement.item() == TOKENS
    assert hidden.grad.abs().max() < 1e-14


def test_huge_logits_stay_finite():
    data = problem(torch.float32)
    for name in ("student_hidden", "teacher_hidden"):
        data[name] = (data[name] * 1e4).requires_grad_(name == "student_hidden")
    loss = fused_alone(data)
    loss.loss_sum.backward()
    assert math.isfinite(loss.loss_sum.item())
    assert data["student_hidden"].grad.isfinite().all()


def test_a_label_outside_the_vocabulary_is_not_passed_over():
    data = problem()
    for wrong in (14, PADDED, -1):
        labels = data["labels"].clone()
        labels[2] = wrong
        arguments = (data["student_hidden"], data["student_weight"], labels)
        assert math.isnan(fused_linear_cross_entropy(*arguments, vocab_size=14).ce_sum.item())
        masked = torch.arange(TOKENS) != 2
        assert math.isfinite(fused_linear_cross_entropy(*arguments, masked, vocab_size=14).ce_sum.item())


def test_bfloat16_stays_near_the_float64_reference():
    data = problem(torch.bfloat16)
    for name in ("student_hidden", "student_weight"):
        data[name].requires_grad_()
    expected = reference_kl({k: v.detach() for k, v in data.items()}, 14, 1.0)
    loss = fused_alone(data, keep=data["keep"], chunk_tokens=4)
    loss.loss_sum.backward()
    assert loss.loss_sum.dtype == torch.float32
    torch.testing.assert_close(loss.loss_sum.detach().double(), expected["kl"], **TOL[torch.bfloat16])
    for name in ("hidden", "weight"):
        got, want = data[f"student_{name}"].grad.double(), expected[f"d_{name}"]
        # Logits of magnitude 10 are rounded to 8 bits, so the gradient is judged as a whole, not entry by entry.
        assert (got - want).norm() < 3e-2 * want.norm()


def test_no_tokens_by_vocabulary_tensor_exists_and_validation_skips_the_gradient():
    tokens, vocabulary, width = 96, 64, 4
    student, teacher = (torch.randn(tokens, width) for _ in range(2))
    weights = [torch.randn(vocabulary, width) for _ in range(2)]
    student.requires_grad_()
    weights[0].requires_grad_()

    def largest():
        with LargestTensor() as watch:
            loss = fused_linear_kd(student, weights[0], teacher, weights[1], vocab_size=vocabulary, chunk_tokens=8)
        return watch, loss

    watch, loss = largest()
    assert watch.most <= 8 * vocabulary
    assert watch.matrices == tokens // 8 * 4  # two products forward, two for the gradients
    with torch.no_grad():
        watch, same = largest()
    assert watch.matrices == tokens // 8 * 2
    assert not same.loss_sum.requires_grad
    torch.testing.assert_close(same.loss_sum, loss.loss_sum.detach())


def group_of_one():
    data = problem()
    values = []
    for tp in (None, distributed.group.WORLD):
        hidden = data["student_hidden"].clone().requires_grad_()
        rest = data["student_weight"], data["teacher_hidden"], data["teacher_weight"]
        loss = fused_linear_kd(hidden, *rest, vocab_size=14, tp=tp)
        loss.loss_sum.backward()
        values.append((loss.loss_sum.item(), hidden.grad))
    return values


def test_a_group_of_one_rank_is_the_same_as_none():
    ((alone, grouped),) = run_on_ranks(1, group_of_one)
    assert alone[0] == grouped[0]
    assert torch.equal(alone[1], grouped[1])
