"""Attention of the layers that are used without Transformer Engine, and the kernels torch takes for them."""

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import dense
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Kind, Outcome, check
from nemo_minitron.megatron.functional import causal_attention, rotary_tables

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Of SmolLM2 and Qwen2.5, Phi-2's family, Phi-3, Llama and Mistral, Gemma."""
WINDOWS = (None, 1, 100, 128)
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
GIGABYTE = 1e9


def _inputs(
    bench: Bench, *, length: int, batch: int, groups: int, queries: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`qkv`, and the angles of positions `[S, D / 2]` in float64."""
    torch.manual_seed(head_dim)
    qkv = torch.randn(length, batch, groups * (queries + 2) * head_dim, device=bench.device).to(dtype)
    frequencies = 1e4 ** -torch.arange(0, 1, 2 / head_dim, dtype=torch.float64, device=bench.device)
    positions = torch.arange(length, dtype=torch.float64, device=bench.device)
    return qkv.requires_grad_(), torch.outer(positions, frequencies)


def _tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rotary_tables(torch.cat([angles, angles], -1)[:, None, None].float(), dtype)


@check(order=40, seconds=30)
def attention_right(bench: Bench) -> Outcome:
    """Attention of every head size and window, forward and backward, against float64."""
    length = 160 if bench.tiny else 512
    worst, wrong, figures = (0.0, ""), [], {}
    for dtype, head_dim, window in product(TOLERANCES, HEAD_DIMS, WINDOWS):
        qkv, angles = _inputs(bench, length=length, batch=2, groups=2, queries=3, head_dim=head_dim, dtype=dtype)
        out = causal_attention(qkv, _tables(angles, dtype), groups=2, head_dim=head_dim, window=window)
        wide = qkv.detach().double().requires_grad_()
        expected = dense.causal_attention(wide, angles, groups=2, head_dim=head_dim, window=window)
        slope = torch.randn_like(expected)
        out.backward(slope.to(dtype))
        expected.backward(slope.to(dtype).double())
        label = f"D{head_dim} window {window} {str(dtype).removeprefix('torch.')}"
        errors = dense.relative_error(out, expected), dense.relative_error(qkv.grad, wide.grad)
        figures[label] = errors
        worst = max(worst, (max(errors), label))
        if not max(errors) <= TOLERANCES[dtype]:
            wrong.append(f"{label}: forward {errors[0]:.1e}, gradient {errors[1]:.1e}")
    figure = f"{len(figures)} cases, largest relative error {worst[0]:.1e} ({worst[1]})"
    return Outcome(figure="\n".join([figure, *wrong]), ok=not wrong, figures=figures)


def _forward_backward(qkv: Tensor, tables: tuple[Tensor, Tensor], **how: Any) -> None:
    causal_attention(qkv, tables, **how).sum().backward()
    qkv.grad = None


@check(order=60, seconds=20, kind=Kind.SPEED)
def attention_speed(bench: Bench) -> Outcome:
    """Time, memory and kernels of attention at models' sizes; none may build complete score matrices."""
    lines, figures, ok = [], {}, True
    shapes = [(9, 3, 64, 2048, None), (32, 8, 128, 8192, None), (32, 8, 128, 8192, 4096)]
    shapes += [(8, 4, 256, 8192, None), (8, 4, 256, 8192, 1024)]
    if bench.tiny:
        shapes = [(heads, groups, head_dim, 64, window and 16) for heads, groups, head_dim, _, window in shapes]
    for heads, groups, head_dim, length, window in shapes:
        label = f"{heads}/{groups} heads of {head_dim}, S {length}, window {window}"
        qkv, angles = _inputs(
            bench,
            length=length,
            batch=1,
            groups=groups,
            queries=heads // groups,
            head_dim=head_dim,
            dtype=bench.dtype,
        )
        tables = _tables(angles, bench.dtype)

        once = partial(_forward_backward, qkv, tables, groups=groups, head_dim=head_dim, window=window)
        try:
            seconds, peak, found = bench.seconds(once), bench.peak_gb(once), bench.kernels(once)
        except torch.OutOfMemoryError:
            lines.append(f"{label}: OUT OF MEMORY")
            ok = False
            continue
        matrices = heads * length**2 * 4 / GIGABYTE
        ok = ok and (bench.tiny or peak < matrices)
        words = ("flash", "cudnn", "fmha", "flex", "softmax", "cutlass")
        kernels = [name for name in found.names if any(word in name.lower() for word in words)]
        figures[label] = {"ms": seconds * 1e3, "peak_gb": peak, "kernels": kernels}
        lines.append(f"{label}: {seconds * 1e3:.2f} ms, {peak:.2f} GB (score matrices would be {matrices:.1f})")
    return Outcome(figure="\n".join(lines), ok=ok, figures=figures)
