"""Mamba-2's mixer between its two projections: causal convolution, selective state-space scan, gated norm.

Source: Dao and Gu, "Transformers are SSMs", arXiv:2405.21060. Everything is plain torch with a graph by autograd; sums
are in fp32 (float64 stays float64). On a GPU `kernels.state_space` computes the same.

Shapes: B samples, S positions, C channels of the convolution, K taps, H heads, P channels of a head, G groups of heads
that share their input and output maps, R heads of a group, N channels of the state.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from nemo_minitron.ops.widening import at_least_fp32


class Scan(NamedTuple):
    """What a scan returns."""

    output: Tensor
    """`[B, S, H, P]`, in the dtype of the input."""
    state: Tensor
    """After the last position, `[B, H, P, N]`, at least fp32."""


def causal_convolution(x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """SiLU of each channel's convolution with its own taps: position `s` sees `s - K + 1` to `s`; `[B, S, C]`.

    The last tap belongs to the position itself. Positions before the first are zero.
    """
    taps, length = weight_CK.shape[1], x_BSC.shape[1]
    wide = at_least_fp32(x_BSC)
    padded = F.pad(wide, (0, 0, taps - 1, 0))
    weight = weight_CK.to(wide.dtype)
    total = sum(padded[:, tap : tap + length] * weight[:, tap] for tap in range(taps))
    assert isinstance(total, Tensor)
    return F.silu(total if bias_C is None else total + bias_C.to(wide.dtype)).to(x_BSC.dtype)


def state_space_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    a_H: Tensor,
    b_BSGN: Tensor,
    c_BSGN: Tensor,
    *,
    chunk: int = 128,
    state_BHPN: Tensor | None = None,
) -> Scan:
    """The selective scan `h_s = exp(dt_s a) h_{s-1} + dt_s x_s b_s^T`, `y_s = h_s c_s`, by chunks of positions.

    Inside a chunk all positions are computed together, as attention with a decay (arXiv:2405.21060, section 6); from
    chunk to chunk only the state goes on. The result does not depend on the size of a chunk beyond rounding.

    Args:
        x_BSHP: Input.
        dt_BSH: Step sizes, positive.
        a_H: Decay rates, negative.
        b_BSGN: Input maps, one for each group of heads.
        c_BSGN: Output maps, likewise.
        chunk: Positions of a chunk. Memory grows with it times the sequence.
        state_BHPN: State before the first position; None for zero.
    """
    batch, length, heads, channels = x_BSHP.shape
    groups, width = b_BSGN.shape[2:]
    size = min(chunk, length)
    missing = -length % size
    x, dt, b, c = (at_least_fp32(each) for each in (x_BSHP, dt_BSH, b_BSGN, c_BSGN))
    # Positions behind the end have steps of zero: they neither decay nor add.
    x, dt, b, c = (F.pad(each, (0, 0) * (each.dim() - 2) + (0, missing)) for each in (x, dt, b, c))
    x = (x * dt[..., None]).view(batch, -1, size, groups, heads // groups, channels)
    b, c = (each.view(batch, -1, size, groups, width) for each in (b, c))
    # In float64: differences of sums over a chunk would lose digits.
    summed = (dt.double() * a_H.double()).view(batch, -1, size, groups, heads // groups).cumsum(2)
    states, last = _states(x, b, summed, state_BHPN)
    found = _inside(x, b, c, summed) + _from_before(c, summed, states)
    output = found.reshape(batch, -1, heads, channels)[:, :length].to(x_BSHP.dtype)
    return Scan(output, last.reshape(batch, heads, channels, width))


def _inside(x: Tensor, b: Tensor, c: Tensor, summed: Tensor) -> Tensor:
    """What positions of a chunk give to later ones of it, and to themselves: `[B, chunks, L, G, R, P]`."""
    size = summed.shape[2]
    by_head = summed.permute(0, 1, 3, 4, 2)
    apart = by_head[..., :, None] - by_head[..., None, :]
    later = torch.ones(size, size, dtype=torch.bool, device=apart.device).triu(1)
    decay = apart.masked_fill(later, -torch.inf).exp().to(x.dtype)
    scores = torch.einsum("zklgn,zksgn->zkgls", c, b)
    return torch.einsum("zkgrls,zksgrp->zklgrp", scores[:, :, :, None] * decay, x)


def _states(x: Tensor, b: Tensor, summed: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states before each chunk, `[B, chunks, G, R, P, N]`, and the one behind the last, `[B, G, R, P, N]`."""
    to_end = (summed[:, :, -1:] - summed).exp().to(x.dtype)
    added = torch.einsum("zksgn,zksgrp->zkgrpn", b, x * to_end[..., None])
    through = summed[:, :, -1].exp().to(x.dtype)[..., None, None]
    state = torch.zeros_like(added[:, 0]) if first is None else first.to(x.dtype).reshape(added[:, 0].shape)
    before = []
    for index in range(added.shape[1]):
        before.append(state)
        state = through[:, index] * state + added[:, index]
    return torch.stack(before, 1), state


def _from_before(c: Tensor, summed: Tensor, states: Tensor) -> Tensor:
    """What the states before each chunk give to its positions: `[B, chunks, L, G, R, P]`."""
    return torch.einsum("zklgn,zkgrpn->zklgrp", c, states) * summed.exp().to(c.dtype)[..., None]


def gated_group_norm(y: Tensor, gate: Tensor, weight: Tensor, *, groups: int, eps: float) -> Tensor:
    """`y silu(gate)`, divided by its root mean square over each group's channels, times `weight`; `[..., H * P]`.

    Source: arXiv:2405.21060, section 7.1; the norm is taken group by group, as Megatron's and Nemotron-H's mixers do.
    """
    wide = at_least_fp32(y)
    grouped = (wide * F.silu(gate.to(wide.dtype))).view(*y.shape[:-1], groups, -1)
    normed = grouped * (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled: Tensor = normed.flatten(-2) * weight.to(wide.dtype)
    return scaled.to(y.dtype)
