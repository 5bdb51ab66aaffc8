"""The Triton form of a site's sums against float64 over the kept positions, in Triton's interpreter."""

from itertools import product

import pytest
import torch

from benchmarks.gpu import models, scores
from tests.ranks import run_on_ranks

pytest.importorskip("triton")

SHAPES = ((1, 1, 1), (70, 2, 130), (33, 3, 128), (600, 1, 5))
"""Positions, samples, channels: less than a tile, several with a rest, and several runs of positions."""
MEANS = (0.0, 300.0)


def cases():
    yield from product(SHAPES, MEANS, (torch.float32, torch.bfloat16), (False, True))
    yield (40, 2, 6), 1.0, torch.float32, "strided"


def activations(shape, mean, dtype, masked):
    generator = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(*shape, generator=generator) + mean).to(dtype)
    if masked == "strided":
        x = torch.randn(shape[0], shape[1], 3 * shape[2], generator=generator)[..., ::3]
    keep = torch.rand(shape[1], shape[0], generator=generator) > 0.3 if masked is True else None
    if keep is not None:
        keep[0] = False  # a sample of which nothing counts
        x[~keep.t()] = float("nan")
    return x, keep


def job(every):
    from nemo_minitron.kernels.moments import moments_block

    return [tuple(moments_block(*activations(*case))) for case in every]


@pytest.mark.slow
def test_mean_absolute_mean_and_variance_are_those_of_float64():
    every = list(cases())
    (found,) = run_on_ranks(1, job, every, interpret=True)
    for case, (abs_mean, mean, variance, rows) in zip(every, found, strict=True):
        x, keep = activations(*case)
        wide = x.double() if keep is None else torch.where(keep.t()[..., None], x.double(), 0)
        expected = wide.abs().mean(0), wide.mean(0), wide.var(0, unbiased=False)
        size = wide.square().mean(0).sqrt().flatten()  # a mean near zero is what is left of much larger numbers
        # Means of tiles are rounded to 2e-5 where they are 300.
        limits = 1e-6 * size, 1e-6 * size, 1e-4 * expected[2].flatten()
        names = ("mean of |x|", "mean", "variance")
        for name, value, right, limit in zip(names, (abs_mean, mean, variance), expected, limits, strict=True):
            error = (value.double() - right.flatten()).abs()
            assert (error <= limit + 1e-12).all(), f"{case}, {name}: {error.max()}"
        assert rows == case[0][0]


def all_scores():
    return scores.collect(models.TINY)


@pytest.mark.slow
def test_a_model_s_scores_are_those_of_the_plain_sums():
    (found,), (expected,) = (run_on_ranks(1, all_scores, interpret=interpret) for interpret in (True, False))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-5, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
