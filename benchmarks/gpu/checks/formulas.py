"""Formulas that take another path on a GPU than on a CPU."""

from itertools import product

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Outcome, check
from nemo_minitron.kernels.available import kernels_run
from nemo_minitron.megatron.functional import rms_norm
from nemo_minitron.ops.importance import Block, block_rows, joined_moments, sequence_blocks
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


@check(order=42, seconds=5)
def moments_right(bench: Bench) -> Outcome:
    """Mean, length and variance of activations far from zero, against float64, in the form that scores take."""
    figures = {}
    # A sequence that is one run for the kernel, one of several, and one with channels left over; also of one sample.
    shapes = ((128, 1, 130), (1024, 2, 64), (4096, 1, 4096))
    for dtype, shape, offset in product((torch.float32, torch.bfloat16), shapes, (0.0, 30.0, 300.0)):
        torch.manual_seed(0)
        x = (torch.randn(shape) + offset).to(dtype)
        count = torch.full((shape[1],), len(x), dtype=torch.float64, device=bench.device)
        found = joined_moments([_block(x.to(bench.device))], count).finish().cpu()
        wide = x.double()
        expected = torch.stack([wide.abs().mean(0), wide.norm(dim=0), wide.var(0, unbiased=False)])
        name = f"mean {offset:g}"
        worst = ((found.double() - expected) / expected).abs().max().item()
        figures[name] = max(figures.get(name, 0.0), worst)
    figure = ", ".join(f"{name} deviations: {value:.1e}" for name, value in figures.items())
    return Outcome(figure=f"largest relative error, {figure}", ok=max(figures.values()) < 1e-3, figures=figures)


def _block(x: torch.Tensor) -> Block:
    if kernels_run(x.device, x.dtype):
        from nemo_minitron.kernels.moments import moments_block

        return moments_block(x, None)
    return sequence_blocks(x, None, block_rows(*x.shape, x.device), Workspace())
