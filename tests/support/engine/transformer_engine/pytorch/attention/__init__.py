"""Causal attention with grouped queries; under context parallelism each rank has a piece from either end."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor
from torch.distributed import ProcessGroup

from transformer_engine.pytorch.communication import Gather
from transformer_engine.pytorch.state import ExtraState

_cu_seqlens: dict[tuple[int, int, torch.device], Tensor] = {}
"""Cumulative sequence lengths by batch and length, kept for the life of the process as the original keeps them."""


class _Attention(torch.autograd.Function):
    """Saves what the original saves for its backward pass, the cached sequence lengths too."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, seen, scale, lengths = inputs
        ctx.save_for_backward(q, k, v, seen, lengths)
        ctx.scale = scale
        return _attention(q, k, v, seen, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, seen, lengths = ctx.saved_tensors
        assert int(lengths[-1]) == inputs[0].shape[0] * inputs[0].shape[2]
        with torch.enable_grad():
            copies = [x.detach().requires_grad_() for x in inputs]
            gradients = torch.autograd.grad(_attention(*copies, seen, ctx.scale), copies, grad)
        return *gradients, None, None, None


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)


class DotProductAttention(ExtraState):
    """Queries, keys and values `[s, b, heads, d]` of this tensor-parallel rank; `[s, b, heads * d]` comes back.

    In format "thd", `[t, heads, d]` with cumulative lengths of the documents.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        *,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        softmax_scale: float | None = None,
        window_size: tuple[int, int] | None = None,
        cp_group: ProcessGroup | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if attention_dropout:
            raise RuntimeError("dropout")
        self.softmax_scale, self.window_size, self.cp_group = softmax_scale, window_size, cp_group
        self.register_load_state_dict_post_hook(_forgive_extra_state)

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: str = "causal",
        *,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
    ) -> Tensor:
        packed = qkv_format == "thd"
        if attn_mask_type != ("padding_causal" if packed else "causal") or attention_mask is not None:
            raise RuntimeError(f"mask {attn_mask_type}")
        if cu_seqlens_q_padded is not None or cu_seqlens_kv_padded is not None:
            raise RuntimeError("padding between documents")
        if packed:
            return self._packed((query_layer, key_layer, value_layer), (cu_seqlens_q, cu_seqlens_kv), max_seqlen_q)
        length, batch, heads, channels = query_layer.shape
        places = _places(length, self.cp_group, query_layer.device)
        if self.cp_group is not None:
            order = torch.cat(
                [_places(length, self.cp_group, places.device, rank) for rank in range(self.cp_group.size())]
            )
            back = order.argsort()
            key_layer, value_layer = (Gather.apply(x, self.cp_group)[back] for x in (key_layer, value_layer))
        behind = places[:, None] - torch.arange(key_layer.shape[0], device=places.device)
        seen = behind >= 0
        if self.window_size is not None and self.window_size[0] >= 0:
            seen &= behind <= self.window_size[0]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        out = _Attention.apply(q, k, v, seen, self.softmax_scale, _lengths(batch, length, places.device))
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * channels)

    def _packed(self, qkv: tuple[Tensor, Tensor, Tensor], ends: tuple[Tensor, Tensor], longest: int | None) -> Tensor:
        """Documents one behind the other, `[t, heads, d]`; `[t, heads * d]` comes back."""
        tokens, heads, channels = qkv[0].shape
        assert ends[0].dtype == torch.int32
        assert torch.equal(*ends)
        lengths = ends[0].diff()
        if self.cp_group is not None or int(ends[0][-1]) != tokens or longest != int(lengths.max()):
            raise RuntimeError(f"documents of {lengths.tolist()} tokens, {longest} at most, in {tokens}")
        document = torch.arange(len(lengths)).repeat_interleave(lengths.cpu().long())
        places = torch.arange(tokens)
        behind = places[:, None] - places
        seen = (behind >= 0) & (document[:, None] == document)
        if self.window_size is not None and self.window_size[0] >= 0:
            seen &= behind <= self.window_size[0]
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv)
        out = _Attention.apply(q, k, v, seen.to(q.device), self.softmax_scale, ends[0])
        return out[0].transpose(0, 1).reshape(tokens, heads * channels)


def _places(length: int, group: ProcessGroup | None, device: torch.device, rank: int | None = None) -> Tensor:
    """Positions that a context-parallel rank holds: of `2 * size` pieces, one from either end."""
    if group is None:
        return torch.arange(length, device=device)
    rank, size = group.rank() if rank is None else rank, group.size()
    pieces = torch.arange(length * size, device=device).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def _lengths(batch: int, length: int, device: torch.device) -> Tensor:
    key = batch, length, device
    if key not in _cu_seqlens:
        _cu_seqlens[key] = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    return _cu_seqlens[key]


def _forgive_extra_state(module: torch.nn.Module, keys: Any) -> None:
    """Older checkpoints have no extra state of the attention; the original forgives that, of this module alone."""
    for name in [name for name in keys.missing_keys if "core_attention._extra_state" in name]:
        keys.missing_keys.remove(name)
