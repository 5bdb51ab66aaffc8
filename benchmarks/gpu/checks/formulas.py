"""Formulas that take another path on a GPU than on a CPU."""

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Outcome, check
from nemo_minitron.megatron.functional import rms_norm
from nemo_minitron.ops.importance import block_rows, joined_moments, sequence_blocks
from nemo_minitron.ops.memory import Workspace


@check(order=41, seconds=3)
def norms_right(bench: Bench) -> Outcome:
    """RMSNorm with ordinary and zero-centred weights: no channel is off in one direction."""
    torch.manual_seed(0)
    rows, width = (64, 256) if bench.tiny else (1024, 4096)
    x = torch.randn(rows, width, device=bench.device).to(torch.bfloat16)
    w = (torch.rand(width, device=bench.device) * 2 - 0.5).to(torch.bfloat16)
    figures = {}
    for name, offset in (("ordinary", 0.0), ("zero-centred", 1.0)):
        weight = w.float() + offset if offset else w
        exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * (w.double() + offset)
        # Towards larger numbers or smaller ones; numbers of millions, some of which are exactly zero.
        off = (rms_norm(x, weight, 1e-6).double() - exact).mul(exact.sign()).sum(0) / exact.abs().sum(0)
        figures[f"{name}, worst channel"] = off.abs().max().item()
    limit = 2.0**-9  # a rounding of bf16: errors of single numbers are that large, means over tokens far smaller
    figure = ", ".join(f"{name} {value:.1e}" for name, value in figures.items())
    return Outcome(
        figure=f"mean relative error of a channel: {figure}", ok=max(figures.values()) < limit, figures=figures
    )


@check(order=42, seconds=2)
def moments_right(bench: Bench) -> Outcome:
    """Mean, length and variance of activations far from zero, against float64."""
    figures = {}
    for offset in (0.0, 30.0, 300.0):
        torch.manual_seed(0)
        x = torch.randn(1024, 2, 64) + offset
        count = torch.full((x.shape[1],), len(x), dtype=torch.float64, device=bench.device)
        blocks = sequence_blocks(x.to(bench.device), None, block_rows(*x.shape, count.device), Workspace())
        found = joined_moments([blocks], count).finish().cpu()
        wide = x.double()
        expected = torch.stack([wide.abs().mean(0), wide.norm(dim=0), wide.var(0, unbiased=False)])
        figures[f"mean {offset:g}"] = ((found.double() - expected) / expected).abs().max().item()
    figure = ", ".join(f"{name} deviations: {value:.1e}" for name, value in figures.items())
    return Outcome(figure=f"largest relative error, {figure}", ok=max(figures.values()) < 1e-3, figures=figures)
