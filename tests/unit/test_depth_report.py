"""The report's figures of depth metrics: there when they were measured, and about the right layers."""

from dataclasses import replace

import numpy as np
import torch

from nemo_minitron.pruning.depth import DepthScores
from nemo_minitron.report import build, figures
from nemo_minitron.stages.report import depth_curves
from tests.support.depth_scores import SPEC, tensors
from tests.unit.report_sample import DROPPED, content, importance


def measured(*, blocks: bool = True, low: float = 0.01):
    """Depth metrics in the shapes of the sample."""
    draw = np.random.default_rng(1)
    layers = {name: draw.uniform(low, 3, 30) for name in ("lm_loss", "logit_mse")}
    curves = {length: draw.uniform(0.1, 9, 31 - length) for length in range(2, 30 if blocks else 2)}
    depth = depth_curves(DepthScores(SPEC, tensors()))
    return replace(depth, layers=layers, blocks=dict.fromkeys(layers, curves))


def test_curves_are_the_scores_own():
    depth = depth_curves(DepthScores(SPEC, tensors()))
    assert depth.layers["logit_mse"].tolist() == [4 / 16, 8 / 16, 2 / 16, 1 / 16]
    assert {length: len(curve) for length, curve in depth.blocks["lm_loss"].items()} == {2: 3, 3: 2}
    assert depth.samples == 2
    assert torch.equal(torch.tensor(depth.blocks["lm_loss"][3]), DepthScores(SPEC, tensors()).curve("lm_loss", 3))


def test_the_report_shows_them_only_when_they_were_measured():
    without = build.html(content(importance=importance()))
    assert "left out" not in without
    html = build.html(content(importance=replace(importance(), depth=measured())))
    assert "Layers left out one by one" in html
    assert html.count("Layers left out in a row") == 2  # one a metric
    for metric in ("lm_loss", "logit_mse"):
        assert f"Curves: {metric} without blocks of consecutive layers" in html
    html = build.html(content(importance=replace(importance(), depth=measured(blocks=False))))
    assert "Layers left out one by one" in html
    assert "in a row" not in html


def test_the_number_of_layers_that_went_has_a_curve_of_its_own():
    svg = figures.block_curve(replace(importance(), depth=measured()), "lm_loss").wide
    assert f"{len(DROPPED)} layers, as many as went" in svg
    assert "nats per token" in svg


def test_dropped_layers_are_marked_and_losses_below_zero_can_be_drawn():
    found = replace(importance(), depth=measured(low=-0.5))
    svg = figures.leave_one_out(found).wide
    assert svg.count(figures.CUT) == 2 * len(DROPPED) + 2  # a bar in each panel, the legend's patch and its sample
    assert figures.leave_one_out(found).wide == svg
