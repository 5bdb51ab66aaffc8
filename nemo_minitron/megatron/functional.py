"""The formulas a decoder layer spends its time in, with backward passes written for the CPU.

Plain PyTorch is memory-bound here: every element-wise step is a pass over `[tokens, channels]`, autograd keeps each
intermediate, and the CPU backward of scaled-dot-product attention in bf16 is slow. The functions below do their sums in
fp32 (float64 stays float64), keep few tensors, and work in place on what they own. On a GPU
`scaled_dot_product_attention` and `rms_norm` are fused already and are used instead.

Shapes: S sequence, B batch, H hidden, F neurons of this rank, G KV groups of this rank, R query heads of a group,
D channels of a head.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from nemo_minitron.ops import autograd
from nemo_minitron.ops.linear import linear, linear_input_gradient
from nemo_minitron.ops.widening import at_least_fp32

Starts = tuple[tuple[int, ...], ...]
"""For each sample, where its documents begin; the first one at 0."""

QUERY_BLOCK = 128
"""Queries a head that attention by blocks takes at a time: 64 and 128 are fastest, 256 leaves the cache."""


class _Linear(torch.autograd.Function):
    """A linear without bias whose weight gradient goes straight into Megatron's fp32 buffer, if the weight has one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = linear_input_gradient(grad, weight) if wants_x else None
        if not wants_weight:
            return grad_x, None
        rows, inputs = grad.flatten(0, -2).t(), x.flatten(0, -2)
        total = getattr(weight, "main_grad", None)
        if total is None or total.dtype != grad.dtype or getattr(weight, "gradient_through_autograd", False):
            return grad_x, rows @ inputs
        # Megatron would make a tensor of it, add that to the buffer, and throw it away.
        total.addmm_(rows, inputs)
        return grad_x, None


def linear_layer(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of `[..., h]` and `[n, h]`, with a graph."""
    product: Tensor = autograd.apply(_Linear, x, weight)
    return product


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, weight_wide = at_least_fp32(x), at_least_fp32(weight)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = torch.mul(wide, scale) if wide is x else wide.mul_(scale)
        if not any(ctx.needs_input_grad):
            return normed.mul_(weight_wide).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight_wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        normed, scale, weight = ctx.saved_tensors
        wide, weight_wide = at_least_fp32(grad), at_least_fp32(weight)
        product = wide * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # d x = scale * (w g - n * mean(w g n)), from n = x * scale(x).
        mean = (product @ weight_wide.unsqueeze(-1)).div_(-normed.shape[-1])
        wide = torch.mul(wide, weight_wide) if wide is grad else wide.mul_(weight_wide)
        return wide.addcmul_(normed, mean).mul_(scale).to(grad.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in fp32 inside; the dtype of `x` comes back.

    Source: Zhang and Sennrich, arXiv:1910.07467, eq. 4.
    """
    if x.is_cuda:
        if weight.dtype == x.dtype:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        # A zero-centred weight comes as 1 + w in fp32: rounded to bf16 it would shift complete channels by up to 4e-3.
        wide = at_least_fp32(x)
        return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps).to(x.dtype)
    normed: Tensor = autograd.apply(_RMSNorm, x, weight, eps)
    return normed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension, in fp32 inside; in the dtype of `x`.

    Source: Ba et al., arXiv:1607.06450, eq. 3.
    """
    wide = at_least_fp32(x)
    return F.layer_norm(wide, (x.shape[-1],), weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2F] = [gate; up]`; shape `[..., F]`. Source: Shazeer, arXiv:2002.05202, eq. 6."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up` with the exact GELU; shapes and source as in `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


def geglu_tanh(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up` with GELU's approximation by tanh; shapes and source as in `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)^2`. Source: So et al., "Primer", arXiv:2109.08668, sec. 3."""
    return F.relu(x).square()


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
    """`[S, B, G * (R + 2) * D]` as `[B * G, R + 2, S, D]`."""
    length, batch, width = qkv.shape
    split = qkv.view(length, batch, groups, width // groups // head_dim, head_dim)
    return split.permute(1, 2, 3, 0, 4).reshape(batch * groups, -1, length, head_dim)


def _tokens_first(x: Tensor, batch: int) -> Tensor:
    """`[B * G, R, S, D]` as `[S, B, G * R * D]`."""
    groups_batch, heads, length, head_dim = x.shape
    split = x.view(batch, groups_batch // batch, heads, length, head_dim)
    return split.permute(3, 0, 1, 2, 4).reshape(length, batch, -1)


class _How(NamedTuple):
    """KV groups, channels of a head, factor of the scores, and how many positions a query sees (None: all).

    `starts` are where the documents of each sample begin; None for one document a sample.
    """

    groups: int
    head_dim: int
    scale: float
    window: int | None
    starts: Starts | None


class _Attention(torch.autograd.Function):
    """Forward, the fused kernel, or blocks in bf16. Backward, always blocks, which compute the weights again.

    A block of queries looks at no key behind its last one, nor at any that its window leaves out, which spares almost
    half of the work or more, and stays in the cache. The query heads of a KV group share products. Memory does not
    grow with the square of the sequence.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tables: tuple[Tensor, Tensor], how: _How) -> Tensor:
        x = _heads_first(qkv, how.groups, how.head_dim)
        turned = _rotate(x[:, :-1], *tables)
        ctx.save_for_backward(turned, x)
        ctx.tables, ctx.batch, ctx.how = tables, qkv.shape[1], how
        return _fused_attention(turned, x[:, -1], ctx.batch, how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        turned, x = ctx.saved_tensors
        how = ctx.how
        heads, length, head_dim = x.shape[1] - 2, x.shape[2], x.shape[3]
        queries, keys, values = turned[:, :-1], turned[:, -1], x[:, -1]
        grad_out = _heads_first(grad, how.groups, head_dim)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_keys = at_least_fp32(torch.zeros_like(keys))
        grad_values = torch.zeros_like(grad_keys)
        for rows, start, end, first in _blocks(length, how):
            q = queries[rows, :, start:end].flatten(1, 2)
            d_out = grad_out[rows, :, start:end].flatten(1, 2)
            k, v = keys[rows, first:end], values[rows, first:end]
            weights = _attention_weights(q, k, heads, how)
            grad_values[rows, first:end] += _products(weights.mT, d_out)
            grad_scores = torch.ops.aten._softmax_backward_data(_products(d_out, v.mT), weights, -1, weights.dtype)
            result[rows, :-2, start:end] = torch.unflatten(_products(grad_scores, k), 1, (heads, end - start))
            grad_keys[rows, first:end] += _products(grad_scores.mT, q)
        result[:, -2] = grad_keys
        result[:, :-1] = _rotate_back(result[:, :-1].mul_(how.scale), *ctx.tables)
        result[:, -1] = grad_values
        return _tokens_first(result, ctx.batch), None, None


def _blocks(length: int, how: _How) -> Iterator[tuple[slice, int, int, int]]:
    """Blocks of queries: which of `B * G`, the first, the one after the last, and the first key that any of them sees.

    No query looks behind the beginning of its document, and no block spans two.
    """
    for rows, begin, stop in _documents(length, how):
        for start in range(begin, stop, QUERY_BLOCK):
            first = begin if how.window is None else max(begin, start - how.window + 1)
            yield rows, start, min(start + QUERY_BLOCK, stop), first


def _documents(length: int, how: _How) -> Iterator[tuple[slice, int, int]]:
    """Documents: which of `B * G`, where they begin, and where they stop. One for all samples where none is divided."""
    if how.starts is None:
        yield slice(None), 0, length
        return
    for sample, starts in enumerate(how.starts):
        rows = slice(sample * how.groups, (sample + 1) * how.groups)
        for begin, stop in zip(starts, (*starts[1:], length), strict=True):
            yield rows, begin, stop


def _products(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of `[N, ., .]` on a CPU, one after the other where that keeps the threads busy.

    MKL gives each thread complete products, so that of three on two threads, one thread has two and the other waits.
    """
    count, threads = a.shape[0], torch.get_num_threads()
    idle = -count % threads
    if a.dtype != torch.float32 or idle * 8 < count + idle:
        return a @ b
    out = a.new_empty(count, a.shape[1], b.shape[2])
    for index in range(count):
        torch.mm(a[index], b[index], out=out[index])
    return out


def _attention_weights(q: Tensor, k: Tensor, heads: int, how: _How) -> Tensor:
    """Softmax of `[BG, R * block, D]` queries, the last ones, over `[BG, keys, D]`: `[BG, R * block, keys]`."""
    rows, keys = q.shape[1] // heads, k.shape[1]
    # A product of bf16 comes back in bf16; the new fp32 tensor may be written over.
    scores = at_least_fp32(_products(q, k.mT)).mul_(how.scale)
    by_head = torch.unflatten(scores, 1, (heads, rows))
    by_head[..., keys - rows :].add_(torch.full((rows, rows), -torch.inf, dtype=scores.dtype).triu_(1))
    if how.window is not None and keys > how.window:
        by_head.add_(torch.full((rows, keys), -torch.inf, dtype=scores.dtype).tril_(keys - rows - how.window))
    return torch.softmax(scores, -1, out=scores).to(q.dtype)


def _attention_by_blocks(turned: Tensor, values: Tensor, how: _How) -> Tensor:
    """Attention of `[B * G, R + 1, S, D]` rotated queries and keys and `[B * G, S, D]` values: `[B * G, R, S, D]`."""
    queries, keys = turned[:, :-1], turned[:, -1]
    heads, length = queries.shape[1:3]
    result = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for rows, start, end, first in _blocks(length, how):
        weights = _attention_weights(queries[rows, :, start:end].flatten(1, 2), keys[rows, first:end], heads, how)
        part = _products(weights, values[rows, first:end])
        result[rows, :, start:end] = torch.unflatten(part, 1, (heads, end - start))
    return result


def _fused_attention(turned: Tensor, values: Tensor, batch: int, how: _How) -> Tensor:
    """Attention of `[B * G, R + 1, S, D]` rotated queries and keys and `[B * G, S, D]` values: `[S, B, G * R * D]`."""
    length, head_dim = values.shape[1:]
    if turned.dtype == torch.bfloat16 and not turned.is_cuda:
        # The fused kernel multiplies bf16 at a third of the rate of oneDNN's products.
        return _tokens_first(_attention_by_blocks(turned, values, how), batch)
    q = turned[:, :-1].reshape(batch, -1, length, head_dim)
    k = turned[:, -1].reshape(batch, -1, length, head_dim)
    v = values.reshape(batch, -1, length, head_dim)
    if how.starts is None:
        out = _one_document(q, k, v, how)
    else:
        samples = zip(torch.split(q, 1), torch.split(k, 1), torch.split(v, 1), how.starts, strict=True)
        out = torch.cat([_one_by_one(*sample, how) for sample in samples])
    return out.permute(2, 0, 1, 3).reshape(length, batch, -1)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], how: _How) -> Tensor:
    """Attention inside of each document of one sample; shapes as in `_one_document`."""
    sizes = [stop - begin for begin, stop in zip(starts, (*starts[1:], q.shape[2]), strict=True)]
    parts = zip(torch.split(q, sizes, 2), torch.split(k, sizes, 2), torch.split(v, sizes, 2), strict=True)
    return torch.cat([_one_document(*part, how) for part in parts], dim=2)


def _one_document(q: Tensor, k: Tensor, v: Tensor, how: _How) -> Tensor:
    """Fused attention of `[B, heads, S, D]` queries to `[B, G, S, D]` keys: `[B, heads, S, D]`."""
    length = q.shape[2]
    if q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        # No fused kernel takes fp32 and grouped queries: PyTorch would compute the scores of all heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if how.window is None or how.window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=how.scale, enable_gqa=True)
    if q.is_cuda:
        return _windowed_attention(q, k, v, how.window, how.scale)
    mask = _window_mask(length, how.window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale, enable_gqa=True)


def _windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attention of `[B, heads, S, D]` queries to the latest `window` of `[B, G, S, D]` keys: `[B, heads, S, D]`.

    Blocks of `window` queries each look at their own keys and those of the block before, so work and memory grow with
    `S * window`. KV heads are repeated: at some head sizes no fused kernel takes both a mask and grouped queries, and
    PyTorch computes fp32 scores of all heads instead, `[B, heads, S, S]`.
    """
    batch, heads, length, _ = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    blocks = -(-length // window)
    if 2 * blocks * window**2 >= length**2:
        mask = _window_mask(length, window, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    behind = blocks * window - length

    def with_block_before(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, window, behind)).unfold(2, 2 * window, window).mT.transpose(1, 2).flatten(0, 1)

    q_blocks = torch.unflatten(F.pad(q, (0, 0, 0, behind)), 2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    mask = _block_mask(batch, blocks, window, q.device)
    out = F.scaled_dot_product_attention(
        q_blocks, with_block_before(k), with_block_before(v), attn_mask=mask, scale=scale
    )
    return torch.unflatten(out, 0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


@lru_cache(maxsize=2)
def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys a query sees, `[S, S]`. Kept, since every layer of a model asks for the same one."""
    with torch.inference_mode(False):
        return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)


@lru_cache(maxsize=2)
def _block_mask(batch: int, blocks: int, window: int, device: torch.device) -> Tensor:
    """Which keys a block's queries see, `[B * blocks, 1, window, 2 * window]`; none lie before the first."""
    with torch.inference_mode(False):
        band = torch.ones(window, 2 * window, dtype=torch.bool, device=device).tril_(window).triu_(1)
        mask = band.repeat(blocks, 1, 1)
        mask[0, :, :window] = False
        return mask.repeat(batch, 1, 1).unsqueeze(1)


def causal_attention(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    *,
    groups: int,
    head_dim: int,
    scale: float | None = None,
    window: int | None = None,
    starts: Starts | None = None,
) -> Tensor:
    """Causal grouped-query attention with rotary positions.

    Args:
        qkv: `[S, B, G * (R + 2) * D]`, for each KV group its R query heads, its key head and its value head.
        tables: `rotary_tables` of the positions, `[S, rotated]`, or `[B, S, rotated]` where samples differ.
        groups: KV groups, G.
        head_dim: Channels of a head, D.
        scale: Factor of the scores; None: `1 / sqrt(D)`.
        window: Positions that a query sees, its own and those before; None: all.
        starts: Where the documents of each sample begin, the first at 0; a query sees none before its own. None for one
            document a sample.

    Returns:
        `[S, B, G * R * D]`, query heads in the order of their groups.
    """
    how = _How(groups, head_dim, head_dim**-0.5 if scale is None else scale, window, starts)
    if tables[0].dim() == 3:
        tables = tables[0].repeat_interleave(groups, 0)[:, None], tables[1].repeat_interleave(groups, 0)[:, None]
    if torch.is_grad_enabled() and qkv.requires_grad and not qkv.is_cuda:
        attended: Tensor = autograd.apply(_Attention, qkv, tables, how)
        return attended
    x = _heads_first(qkv, groups, head_dim)
    return _fused_attention(_rotate(x[:, :-1], *tables), x[:, -1], qkv.shape[1], how)
