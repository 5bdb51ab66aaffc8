"""The four formulas a decoder layer spends its time in, with backward passes written for the CPU.

Plain PyTorch is memory-bound here: every element-wise step is a pass over `[tokens, channels]`, autograd keeps each
intermediate, and the CPU backward of scaled-dot-product attention in bf16 is slow. The functions below do their sums in
fp32 (float64 stays float64), keep few tensors, and work in place on what they own. On a GPU
`scaled_dot_product_attention` and `rms_norm` are fused already and are used instead.

Shapes: S sequence, B batch, H hidden, F neurons of this rank, G KV groups of this rank, R query heads of a group,
D channels of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

EXPLICIT_ATTENTION_LIMIT = 1024
"""Longest sequence whose attention weights are kept for the backward pass: they take S * S numbers a head."""


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = torch.mul(wide, scale) if wide is x else wide.mul_(scale)
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        wide = _wide(grad)
        product = wide * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # d x = scale * (w g - n * mean(w g n)), from n = x * scale(x).
        mean = (product @ weight.to(product.dtype).unsqueeze(-1)).div_(-normed.shape[-1])
        wide = torch.mul(wide, weight) if wide is grad else wide.mul_(weight)
        return wide.addcmul_(normed, mean).mul_(scale).to(grad.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in fp32 inside; the dtype of `x` comes back.

    Source: Zhang and Sennrich, arXiv:1910.07467, eq. 4.
    """
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2F] = [gate; up]`; shape `[..., F]`. Source: Shazeer, arXiv:2002.05202, eq. 6."""
    if gate_up.is_cuda:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the first half negated, of `[S, 1, 1, rotated]` angles, as `[S, rotated]`.

    They are kept with the angles, which Megatron computes once a sequence length.
    """
    tables: dict[torch.dtype, tuple[Tensor, Tensor]] = angles.__dict__.setdefault("_rotary_tables", {})
    if dtype not in tables:
        flat = angles.flatten(1)
        sines = flat.sin()
        sines[:, : sines.shape[1] // 2].neg_()
        tables[dtype] = (flat.cos().to(dtype), sines.to(dtype))
    return tables[dtype]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs `(i, i + rotated/2)` of `[..., S, D]`; channels beyond the rotated ones pass through."""
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat([_rotate(x[..., :rotated], cos, sin), x[..., rotated:]], dim=-1)
    half = rotated // 2
    return torch.cat([x[..., half:], x[..., :half]], dim=-1).mul_(sin).addcmul_(x, cos)


def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `_rotate`."""
    rotated = cos.shape[-1]
    if rotated < grad.shape[-1]:
        return torch.cat([_rotate_back(grad[..., :rotated], cos, sin), grad[..., rotated:]], dim=-1)
    turned = grad * sin
    half = rotated // 2
    return torch.cat([turned[..., half:], turned[..., :half]], dim=-1).addcmul_(grad, cos)


def _heads_first(qkv: Tensor, groups: int, head_dim: int) -> Tensor:
    """`[S, B, G * (R + 2) * D]` as a contiguous `[B * G, R + 2, S, D]`."""
    length, batch, width = qkv.shape
    split = qkv.view(length, batch, groups, width // groups // head_dim, head_dim)
    return split.permute(1, 2, 3, 0, 4).reshape(batch * groups, -1, length, head_dim)


def _tokens_first(x: Tensor, batch: int) -> Tensor:
    """`[B * G, R, S, D]` as `[S, B, G * R * D]`."""
    groups_batch, heads, length, head_dim = x.shape
    split = x.view(batch, groups_batch // batch, heads, length, head_dim)
    return split.permute(3, 0, 1, 2, 4).reshape(length, batch, -1)


class _ExplicitAttention(torch.autograd.Function):
    """Attention weights computed, kept and reused; the query heads of a KV group share one matrix product."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tables: tuple[Tensor, Tensor], groups: int, head_dim: int) -> Tensor:
        x = _heads_first(qkv, groups, head_dim)
        heads, length = x.shape[1] - 2, x.shape[2]
        turned = _rotate(x[:, :-1], *tables)
        q, k, v = turned[:, :-1].flatten(1, 2), turned[:, -1], x[:, -1]
        scores = torch.bmm(q, k.mT).view(-1, heads, length, length)
        weights = torch.add(_causal_bias(scores), scores, alpha=head_dim**-0.5)
        torch.softmax(weights, -1, out=weights)
        weights = weights.to(qkv.dtype).flatten(1, 2)
        out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights, out)
        ctx.tables, ctx.groups, ctx.batch = tables, groups, qkv.shape[1]
        return _tokens_first(out.view(-1, heads, length, head_dim), ctx.batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v, weights, out = ctx.saved_tensors
        length, head_dim = k.shape[1:]
        heads = q.shape[1] // length
        grad_out = _heads_first(grad, ctx.groups, head_dim).flatten(1, 2)
        grad_scores = torch.bmm(grad_out, v.mT)
        # Softmax backward: p * (dp - sum(p dp)), and sum(p dp) = out . d out.
        grad_scores.sub_((grad_out * out).sum(-1, keepdim=True)).mul_(weights)
        grad_qk = k.new_empty(k.shape[0], heads + 1, length, head_dim)
        grad_qk[:, :-1] = torch.bmm(grad_scores, k).view(-1, heads, length, head_dim)
        grad_qk[:, -1] = torch.bmm(grad_scores.mT, q)
        grad_qk.mul_(head_dim**-0.5)
        grad_v = torch.bmm(weights.mT, grad_out).unsqueeze(1)
        grad_qkv = torch.cat([_rotate_back(grad_qk, *ctx.tables), grad_v], dim=1)
        return _tokens_first(grad_qkv, ctx.batch), None, None, None


_biases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _causal_bias(scores: Tensor) -> Tensor:
    """`[S, S]` with 0 where a token may look and minus infinity where it may not, at least fp32."""
    length = scores.shape[-1]
    dtype = torch.float64 if scores.dtype is torch.float64 else torch.float32
    key = (length, dtype, scores.device)
    if key not in _biases:
        _biases.clear()
        _biases[key] = torch.full((length, length), -torch.inf, dtype=dtype, device=scores.device).triu_(1)
    return _biases[key]


def causal_attention(qkv: Tensor, tables: tuple[Tensor, Tensor], *, groups: int, head_dim: int) -> Tensor:
    """Causal grouped-query attention with rotary positions.

    Args:
        qkv: `[S, B, G * (R + 2) * D]`, for each KV group its R query heads, its key head and its value head.
        tables: `rotary_tables` of the positions.
        groups: KV groups, G.
        head_dim: Channels of a head, D.

    Returns:
        `[S, B, G * R * D]`, query heads in the order of their groups.
    """
    length, batch = qkv.shape[:2]
    if torch.is_grad_enabled() and qkv.requires_grad and not qkv.is_cuda and length <= EXPLICIT_ATTENTION_LIMIT:
        return _ExplicitAttention.apply(qkv, tables, groups, head_dim)
    x = _heads_first(qkv, groups, head_dim)
    turned = _rotate(x[:, :-1], *tables)
    q = turned[:, :-1].reshape(batch, -1, length, head_dim)
    k = turned[:, -1].view(batch, groups, length, head_dim)
    v = x[:, -1].view(batch, groups, length, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).reshape(length, batch, -1)
