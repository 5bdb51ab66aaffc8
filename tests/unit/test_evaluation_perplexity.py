"""Perplexity against closed forms, and its error against resampling."""

import math

import pytest
import torch

from nemo_minitron.evaluation.perplexity import perplexity, sample_sums


def test_a_uniform_guess_over_n_tokens_has_perplexity_n_and_no_error():
    sums = sample_sums(torch.full((5, 8), math.log(49)), torch.ones(5, 8, dtype=torch.bool))
    measured = perplexity(sums)
    assert measured.value == pytest.approx(49, rel=1e-6)
    assert measured.standard_error == pytest.approx(0, abs=1e-3)
    assert (measured.tokens, measured.samples) == (40, 5)


def test_masked_positions_do_not_count_not_even_nan():
    nats = torch.tensor([[1.0, math.nan], [3.0, 5.0], [math.inf, math.nan]])
    keep = torch.tensor([[True, False], [True, True], [False, False]])
    measured = perplexity(sample_sums(nats, keep))
    assert (measured.nats_per_token, measured.tokens, measured.samples) == (3.0, 3, 2)


def test_sums_add_up_over_batches():
    generator = torch.Generator().manual_seed(0)
    nats = torch.rand(6, 7, generator=generator)
    keep = torch.rand(6, 7, generator=generator) < 0.6
    first, second = sample_sums(nats[:2], keep[:2]), sample_sums(nats[2:], keep[2:])
    together = perplexity({name: first[name] + second[name] for name in first})
    whole = perplexity(sample_sums(nats, keep))
    assert together.value == pytest.approx(whole.value)
    assert together.standard_error == pytest.approx(whole.standard_error)


def test_the_standard_error_is_the_spread_over_resampled_texts():
    """Bootstrap over samples of unequal length with strongly dependent tokens."""
    generator = torch.Generator().manual_seed(1)
    count = 400
    keep = torch.arange(20) < torch.randint(1, 21, (count, 1), generator=generator)
    nats = 2 + 0.5 * torch.randn(count, 1, generator=generator) + 0.1 * torch.randn(count, 20, generator=generator)
    measured = perplexity(sample_sums(nats, keep))
    sums, lengths = (nats * keep).sum(1), keep.sum(1)
    drawn = torch.randint(0, count, (2000, count), generator=generator)
    spread = (sums[drawn].sum(1) / lengths[drawn].sum(1)).exp().std().item()
    assert measured.standard_error == pytest.approx(spread, rel=0.08)


def test_totals_alone_give_no_error_and_no_tokens_no_number():
    assert perplexity({"nats": 10.0, "tokens": 5}).value == pytest.approx(math.exp(2))
    assert perplexity({"nats": 10.0, "tokens": 5}).standard_error is None
    assert math.isnan(perplexity({"nats": 0.0, "tokens": 0}).value)
    assert perplexity({"nats": 1e6, "tokens": 1}).value == math.inf
