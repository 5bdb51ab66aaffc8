"""Triton kernels of the cross-entropy on a chunk of logits, in two passes.

`cross_entropy_statistics` reads the logits once; `cross_entropy_gradient` reads them again and overwrites them with
their gradient. If the vocabulary is split, a collective stands between the two; see
`nemo_minitron.parallel.kernel_forms`. Each call is one launch, and an operator of torch.

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


@torch.library.custom_op("nemo_minitron::cross_entropy_statistics", mutates_args=("values",))
def cross_entropy_statistics(logits: Tensor, labels: Tensor, values: Tensor, first: int) -> None:
    """Fill `values` `[4, N]`: largest logit, sum of exp(logit - largest), the label's logit, whether it is here.

    The label's logit is 0 where it belongs to another rank. Labels are global token ids `[N]`, `first` that of the
    shard's first token.
    """
    tokens, columns = logits.shape
    with on_device_of(logits):
        _statistics[(tokens,)](
            logits, labels, values, first, columns, logits.stride(0), tokens, BLOCK=BLOCK, num_warps=WARPS
        )


@torch.library.custom_op("nemo_minitron::cross_entropy_gradient", mutates_args=("logits",))
def cross_entropy_gradient(logits: Tensor, normalisers: Tensor, labels: Tensor, first: int) -> None:
    """Overwrite the logits with `softmax - one-hot`.

    `normalisers` `[2, N]` are the peak over the complete vocabulary, and the log of the mass above it.
    """
    tokens, columns = logits.shape
    if not columns:
        return
    with on_device_of(logits):
        _gradient[(tokens, triton.cdiv(columns, BLOCK))](
            logits, normalisers, labels, first, columns, logits.stride(0), tokens, BLOCK=BLOCK, num_warps=WARPS
        )


@triton.jit
def _statistics(logits, labels, values, first, columns, stride, tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    values += row
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((), _EMPTY, tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        x = tl.where(inside, tl.load(logits + start + lanes, mask=inside, other=0).to(tl.float32), _EMPTY)
        new = tl.maximum(peak, tl.max(x, 0))
        mass = mass * tl.exp(peak - new) + tl.exp(x - new)
        peak = new
    column = tl.load(labels + row) - first
    mine = (column >= 0) & (column < columns)
    tl.store(values, peak)
    tl.store(values + tokens, tl.sum(mass, 0))
    tl.store(values + 2 * tokens, tl.load(logits + column, mask=mine, other=0).to(tl.float32))
    tl.store(values + 3 * tokens, mine.to(tl.float32))


@triton.jit
def _gradient(logits, normalisers, labels, first, columns, stride, tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    logits += row * stride
    x = tl.load(logits + column, mask=inside, other=0).to(tl.float32)
    probability = tl.exp(x - tl.load(normalisers + row) - tl.load(normalisers + tokens + row))
    label = tl.load(labels + row) - first
    gradient = probability - tl.where(column == label, 1.0, 0.0)
    tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)
