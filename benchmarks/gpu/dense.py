"""Float64 references of what the package computes in pieces, written from the formulas."""

import torch
from torch import Tensor

from nemo_minitron.ops.divergence import Divergence


def divergence(student: Tensor, teacher: Tensor, what: Divergence) -> Tensor:
    """Of each token, with the temperature's square, from logits `[N, V]` in float64."""
    q = (student / what.temperature).softmax(-1)
    p = (teacher / what.temperature).softmax(-1)
    match what.kind.value:
        case "forward_kl":
            value = _kl(p, q)
        case "reverse_kl":
            value = _kl(q, p)
        case "jensen_shannon":
            middle = what.beta * p + (1 - what.beta) * q
            value = what.beta * _kl(p, middle) + (1 - what.beta) * _kl(q, middle)
        case "skewed_kl":
            value = _kl(p, what.skew * p + (1 - what.skew) * q)
        case "skewed_reverse_kl":
            value = _kl(q, (1 - what.skew) * p + what.skew * q)
        case "total_variation":
            value = (p - q).abs().sum(-1) / 2
        case other:
            raise ValueError(f"no reference for {other}")
    return value * what.temperature**2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def logits(hidden: Tensor, weight: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """`[N, vocab_size]` float64, rounded to `dtype` as the output layer rounds them; the gradient passes through."""
    exact = hidden @ weight[:vocab_size].T
    return exact + (exact.detach().to(dtype).double() - exact.detach())


def causal_attention(qkv: Tensor, angles: Tensor, *, groups: int, head_dim: int, window: int | None) -> Tensor:
    """Grouped-query attention with rotary positions on complete score matrices.

    Args:
        qkv: `[S, B, groups * (heads + 2) * head_dim]` float64: of each group its query heads, its key, its value.
        angles: `[S, rotated / 2]` of each position and pair of channels `(i, i + rotated / 2)`.
        groups: KV groups.
        head_dim: Channels of a head.
        window: Positions a query sees; None: all before it.
    """
    length, batch, _ = qkv.shape
    heads = qkv.view(length, batch, groups, -1, head_dim)
    turned = _turned(heads[..., :-1, :], angles)
    query, key, value = turned[..., :-1, :], turned[..., -1, :], heads[..., -1, :]
    scores = torch.einsum("sbgrd,tbgd->bgrst", query, key) * head_dim**-0.5
    distance = torch.arange(length, device=qkv.device)[:, None] - torch.arange(length, device=qkv.device)
    hidden = (distance < 0) | (distance >= (window or length))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bgrst,tbgd->sbgrd", weights, value).reshape(length, batch, -1)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, multiplied by `exp(i angle)`."""
    half = angles.shape[-1]
    factor = torch.polar(torch.ones_like(angles), angles)[:, None, None, None]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * factor
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm().clamp_min(1e-300))
