"""Sparse targets made from the teacher's states: right, the same at every split, and unbiased."""

import math

import torch
from torch import distributed

from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd
from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd
from nemo_minitron.parallel.sparse_targets import sample_targets, top_k_targets
from tests.ranks import run_on_ranks
from tests.tolerances import TOL

TOKENS, HIDDEN, VOCABULARY, PADDED, K, DRAWS = 23, 5, 14, 20, 3, 40


def teacher(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    # Quarters, whose products and sums are exact: logits are the same to the last bit at every split, ties included.
    hidden = (torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64) * 4).round() / 4
    weight = (torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64) * 4).round() / 4
    weight[1] = weight[6] = weight[12]  # ties, on different ranks
    return hidden.to(dtype), weight.to(dtype)


def probabilities():
    hidden, weight = teacher()
    return torch.softmax(hidden @ weight[:VOCABULARY].t(), -1)


def make(chunk_tokens, temperature=1.0):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    hidden, weight = teacher()
    options = {
        "vocab_size": VOCABULARY,
        "chunk_tokens": chunk_tokens,
        "temperature": temperature,
        "tp": distributed.group.WORLD if world > 1 else None,
    }
    weight = weight.chunk(world)[rank]
    counters = torch.arange(TOKENS) + 1000
    top = top_k_targets(hidden, weight, k=K, **options)
    ids, counts = sample_targets(hidden, weight, counters, draws=DRAWS, seed=11, **options)
    # The second half alone: what is drawn does not depend on who else is in the batch.
    half_ids, half_counts = sample_targets(hidden[9:], weight, counters[9:], draws=DRAWS, seed=11, **options)
    return top.ids, top.log_probs, top.tail, ids, counts, half_ids, half_counts


def every_split():
    return [make(chunk) for chunk in (None, 5)]


def filled(ids, counts, draws=DRAWS):
    """`[N, V]` shares of the draws."""
    dense = torch.zeros(len(ids), VOCABULARY + 1, dtype=torch.float64)
    dense.scatter_add_(1, torch.where(ids < 0, VOCABULARY, ids), counts.double() / draws)
    return dense[:, :VOCABULARY]


def test_targets_are_the_same_at_every_split_and_belong_to_the_teacher():
    answers = [answer for world in (1, 2, 4) for rank in run_on_ranks(world, every_split) for answer in rank]
    first = answers[0]
    for answer in answers[1:]:
        for place in (0, 3, 4, 5, 6):
            assert torch.equal(answer[place], first[place])
        for place in (1, 2):
            torch.testing.assert_close(answer[place], first[place], **TOL[torch.float64])
    ids, log_probs, tail, drawn, counts, half_drawn, half_counts = first
    p = probabilities()
    order = sorted(range(VOCABULARY), key=lambda token: (-round(p[0, token].item(), 12), token))
    assert ids[0].tolist() == order[:K], "the likeliest first, the lower id among equals"
    torch.testing.assert_close(log_probs.exp(), p.topk(K, 1).values, **TOL[torch.float64])
    torch.testing.assert_close(tail, 1 - log_probs.exp().sum(1), **TOL[torch.float64])
    assert torch.equal(counts.sum(1), torch.full((TOKENS,), DRAWS))
    assert torch.equal(filled(half_drawn, half_counts), filled(drawn, counts)[9:])
    assert (drawn.diff(dim=1)[counts[:, 1:] > 0] > 0).all(), "ascending"


def test_shares_of_draws_tend_to_the_distribution():
    hidden, weight = teacher()
    for temperature in (1.0, 2.0):
        p = torch.softmax(hidden @ weight[:VOCABULARY].t() / temperature, -1)
        draws = 4000
        ids, counts = sample_targets(
            hidden, weight, torch.arange(TOKENS), draws=draws, seed=0, vocab_size=VOCABULARY, temperature=temperature
        )
        statistic = (draws * (filled(ids, counts, draws) - p) ** 2 / p).sum()
        freedom = TOKENS * (VOCABULARY - 1)
        # Chi-squared: mean = freedom, variance twice that; four standard deviations, passed by chance once in 10^4.
        assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_gradients_from_sampled_targets_average_to_the_full_gradient():
    """Each entry's mean over 400 seeds lies within 5 standard errors of the full gradient.

    Of 6 x 23 entries that differ from it by chance alone, one in 10^4 runs would have any beyond that.
    """
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(PADDED, 6, generator=generator, dtype=torch.float64).requires_grad_()
    full = fused_linear_kd(student, weight, *teacher(), vocab_size=VOCABULARY)
    expected = torch.autograd.grad(full.loss_sum, (student, weight))
    seeds, draws = 400, 10
    sums = [[torch.zeros_like(x), torch.zeros_like(x)] for x in expected]
    for seed in range(seeds):
        ids, counts = sample_targets(*teacher(), torch.arange(TOKENS), draws=draws, seed=seed, vocab_size=VOCABULARY)
        # In float64: from_counts rounds shares to the float32 that a cache holds.
        shares = SparseTargets(ids=ids, log_probs=(counts.double() / draws).log())
        loss = fused_linear_sparse_kd(student, weight, shares, vocab_size=VOCABULARY).loss_sum
        for total, found in zip(sums, torch.autograd.grad(loss, (student, weight)), strict=True):
            total[0] += found
            total[1] += found**2
    for (total, squares), gradient in zip(sums, expected, strict=True):
        mean = total / seeds
        error = ((squares / seeds - mean**2).clamp_min(0) / seeds).sqrt()
        assert ((mean - gradient).abs() <= 5 * error + 1e-12).all()
        # The bound means something: the average is close, and far closer than a single estimate.
        assert (mean - gradient).norm() < 0.06 * gradient.norm()


def test_no_tokens_by_vocabulary_tensor_is_made():
    from tests.support.largest_tensor import LargestTensor

    hidden, weight = torch.randn(96, 4), torch.randn(64, 4)
    student, weight_s = torch.randn(96, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    with LargestTensor() as watch:
        top_k = top_k_targets(hidden, weight, k=2, vocab_size=64, chunk_tokens=8)
        ids, counts = sample_targets(hidden, weight, torch.arange(96), draws=3, seed=0, vocab_size=64, chunk_tokens=8)
        for targets in (top_k, SparseTargets.from_counts(ids, counts)):
            fused_linear_sparse_kd(student, weight_s, targets, vocab_size=64, chunk_tokens=8).loss_sum.backward()
    assert watch.most <= 8 * 64


def test_bfloat16_ties_and_half_the_precision_do_not_disturb_the_targets():
    hidden, weight = teacher(torch.bfloat16)
    targets = top_k_targets(hidden, weight, k=K, vocab_size=VOCABULARY)
    assert targets.log_probs.dtype == torch.float32
    total = targets.log_probs.exp().sum(1) + targets.tail
    torch.testing.assert_close(total, torch.ones(TOKENS), **TOL[torch.float32])
