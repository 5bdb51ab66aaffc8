"""Triton kernels of the losses on a few entries of the teacher's distribution, for all columns but the entries'.

The entries' logits are taken out first and stand as -inf. `rest_statistics` reads the others once; what the loss needs
of the entries themselves are small tensors; `rest_gradient` reads the others again and overwrites them with their
gradient. If the vocabulary is split, a collective stands between the two; see
`nemo_minitron.parallel.fused_linear_sparse_kd`. Each call is one launch, and an operator of torch.

Shapes: N tokens, V real columns of this rank's shard. Logits `[N, V]` may have any row stride and float dtype; all
else is float32.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# Triton has no types for what a kernel is written in.

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_minitron.kernels.launch import BLOCK, EMPTY, WARPS, on_device_of

_EMPTY = tl.constexpr(EMPTY)


@torch.library.custom_op("nemo_minitron::rest_statistics", mutates_args=("values",))
def rest_statistics(logits: Tensor, values: Tensor, temperature: float) -> None:
    """Fill `values` `[3, N]`: largest logit x, and sums of exp((logit - x) / temperature) and of exp(logit - x).

    Where nothing is left but -inf, the first is `EMPTY` and the sums are 0.
    """
    tokens, columns = logits.shape
    with on_device_of(logits):
        _statistics[(tokens,)](
            logits, values, columns, logits.stride(0), tokens, 1 / temperature, BLOCK=BLOCK, num_warps=WARPS
        )


@torch.library.custom_op("nemo_minitron::rest_gradient", mutates_args=("logits",))
def rest_gradient(logits: Tensor, factors: Tensor, temperature: float) -> None:
    """Overwrite each logit with `a exp((logit - x) / temperature) + b exp(logit - x)`, and -inf with 0.

    `factors` `[3, N]` are x, a and b.
    """
    tokens, columns = logits.shape
    if not columns:
        return
    with on_device_of(logits):
        _gradient[(tokens, triton.cdiv(columns, BLOCK))](
            logits, factors, columns, logits.stride(0), tokens, 1 / temperature, BLOCK=BLOCK, num_warps=WARPS
        )


@triton.jit
def _statistics(logits, values, columns, stride, tokens, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    values += row
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((), _EMPTY, tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    mass_1 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        x = tl.load(logits + start + lanes, mask=start + lanes < columns, other=float("-inf")).to(tl.float32)
        there = x > _EMPTY
        new = tl.maximum(peak, tl.max(x, 0))
        mass = mass * tl.exp((peak - new) * scale) + tl.where(there, tl.exp((x - new) * scale), 0)
        mass_1 = mass_1 * tl.exp(peak - new) + tl.where(there, tl.exp(x - new), 0)
        peak = new
    tl.store(values, peak)
    tl.store(values + tokens, tl.sum(mass, 0))
    tl.store(values + 2 * tokens, tl.sum(mass_1, 0))


@triton.jit
def _gradient(logits, factors, columns, stride, tokens, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    logits += row * stride
    x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
    above = x - tl.load(factors + row)
    at_temperature = tl.load(factors + tokens + row) * tl.exp(above * scale)
    at_one = tl.load(factors + 2 * tokens + row) * tl.exp(above)
    gradient = tl.where(x > _EMPTY, at_temperature + at_one, 0)
    tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)
