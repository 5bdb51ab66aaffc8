"""A Triton kernel that sums up a site's activations over the sequence: mean of x and of |x|, and variance, in one pass.

Plain reductions copy bf16 to fp32 and read the copy twice more, 14 bytes of traffic an element where 2 are needed.

A program takes some positions of some channels of one sample, a tile after the other. The variance of a tile is of
deviations from the tile's mean, and tiles are joined by the formula for the variance of a union (Chan, Golub and
LeVeque, 1979), so that nothing cancels where the mean is large.

Shapes: S positions, B samples, C channels.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# Triton has no types for what a kernel is written in.

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_minitron.kernels.launch import on_device_of
from nemo_minitron.ops.importance import Block

ROWS, COLUMNS, WARPS = 32, 128, 4
"""Of a tile, and of a program: 32 numbers per thread."""
_PROGRAMS = 1024
"""Wanted at the least, so that every multiprocessor has several to choose from."""
_SHORTEST = 256
"""Positions of a program at the least, unless there are fewer."""


def moments_block(x_SBC: Tensor, keep_BS: Tensor | None) -> Block:
    """A complete sequence as one block, in fp32; float64 has no kernel. Masked positions count as zeros."""
    x_SBC = x_SBC if x_SBC.stride(-1) == 1 else x_SBC.contiguous()
    positions, samples, channels = x_SBC.shape
    tiles = samples * triton.cdiv(channels, COLUMNS)
    parts = max(1, min(triton.cdiv(_PROGRAMS, tiles), positions // _SHORTEST))
    length = triton.cdiv(triton.cdiv(positions, parts), ROWS) * ROWS
    parts = triton.cdiv(positions, length)
    found_3PD = torch.empty(3, parts, samples * channels, dtype=torch.float32, device=x_SBC.device)
    sequence_statistics(x_SBC, keep_BS, found_3PD, length)
    share_P1 = torch.full((parts, 1), length / positions, dtype=torch.float32, device=x_SBC.device)
    share_P1[-1] = (positions - (parts - 1) * length) / positions
    abs_mean_PD, mean_PD, variance_PD = found_3PD
    mean = (share_P1 * mean_PD).sum(0)
    variance = (share_P1 * (variance_PD + (mean_PD - mean).square_())).sum(0)
    return Block((share_P1 * abs_mean_PD).sum(0), mean, variance, positions)


@torch.library.custom_op("nemo_minitron::sequence_statistics", mutates_args=("found",))
def sequence_statistics(x: Tensor, keep: Tensor | None, found: Tensor, length: int) -> None:
    """Fill `found` `[3, P, B * C]`: mean of |x|, mean and variance of each of P runs of `length` positions.

    Channels of `x` `[S, B, C]` lie next to each other; where `keep` `[B, S]` is False, x is taken as zero. The length
    is a multiple of `ROWS`; the last run may be shorter.
    """
    positions, samples, channels = x.shape
    parts = found.shape[1]
    if not found.numel():
        return
    with on_device_of(x):
        _sums[(triton.cdiv(channels, COLUMNS), samples, parts)](
            x,
            x if keep is None else keep.contiguous().view(torch.uint8),
            found,
            positions,
            samples,
            channels,
            x.stride(0),
            x.stride(1),
            length,
            KEEP=keep is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )


@triton.jit
def _sums(
    x, keep, found, positions, samples, channels, row_stride, sample_stride, length,
    KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    part = tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    x += sample.to(tl.int64) * sample_stride
    first = part * length
    last = tl.minimum(first + length, positions)
    count = 0.0
    mean = tl.zeros((COLUMNS,), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    absolute = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < last)[:, None] & inside[None, :]
        wanted = there
        if KEEP:
            kept = tl.load(keep + sample.to(tl.int64) * positions + row, mask=row < last, other=0) != 0
            wanted = there & kept[:, None]
        tile = tl.load(x + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=wanted, other=0.0)
        tile = tile.to(tl.float32)
        size = tl.minimum(last - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(tile, 0) / size
        off = tl.where(there, tile - tile_mean[None, :], 0.0)
        apart = tile_mean - mean
        share = size / (count + size)
        squares += tl.sum(off * off, 0) + apart * apart * (count * share)
        mean += apart * share
        absolute += tl.sum(tl.abs(tile), 0)
        count += size
    # Asked of Triton: of an argument that is 1 it makes a Python number, which has no dtype.
    parts = tl.num_programs(2).to(tl.int64)
    width = samples * channels
    out = found + part.to(tl.int64) * width + sample * channels + column
    tl.store(out, absolute / count, mask=inside)
    tl.store(out + parts * width, mean, mask=inside)
    tl.store(out + 2 * parts * width, squares / count, mask=inside)
