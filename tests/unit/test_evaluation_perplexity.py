"""Perplexity against closed forms, and its error against resampling."""

import math

import pytest
import torch

from nemo_minitron.evaluation.perplexity import perplexity


def test_a_uniform_guess_over_n_tokens_has_perplexity_n_and_no_error():
    measured = perplexity([8 * math.log(49)] * 5, [8] * 5)
    assert measured.value == pytest.approx(49)
    assert measured.standard_error == pytest.approx(0, abs=1e-9)
    assert (measured.tokens, measured.units) == (40, 5)


def test_the_mean_is_over_tokens_not_over_units():
    measured = perplexity([1.0, 9.0, 0.0], [1, 4, 0])
    assert (measured.nats_per_token, measured.tokens, measured.units) == (2.0, 5, 2)


def test_the_standard_error_is_the_spread_over_resampled_texts():
    """Bootstrap over units of unequal length with strongly dependent tokens."""
    generator = torch.Generator().manual_seed(1)
    count = 400
    keep = torch.arange(20) < torch.randint(1, 21, (count, 1), generator=generator)
    nats = 2 + 0.5 * torch.randn(count, 1, generator=generator) + 0.1 * torch.randn(count, 20, generator=generator)
    sums, lengths = (nats * keep).sum(1), keep.sum(1)
    measured = perplexity(sums.tolist(), lengths.tolist())
    drawn = torch.randint(0, count, (2000, count), generator=generator)
    spread = (sums[drawn].sum(1) / lengths[drawn].sum(1)).exp().std().item()
    assert measured.standard_error == pytest.approx(spread, rel=0.08)


def test_one_unit_gives_no_error_and_no_tokens_no_number():
    assert perplexity([10.0], [5]).value == pytest.approx(math.exp(2))
    assert perplexity([10.0], [5]).standard_error is None
    assert math.isnan(perplexity([], []).value)
    assert perplexity([1e6], [1]).value == math.inf
