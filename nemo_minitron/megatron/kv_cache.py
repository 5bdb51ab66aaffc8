"""Keys and values of the tokens that a model has read, so that each further token costs one position.

For our own layers (`layers.LocalSelfAttention`). Samples of a batch may have prompts of different lengths: they are
padded on the right, each sample counts its own positions, and what a padded position has left in the cache is written
over before any query looks at it.

Shapes: B samples, S new positions, L positions of the cache, G KV groups of this rank, R query heads of a group, D
channels of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from nemo_minitron.megatron.functional import causal_attention, rotary_tables
from nemo_minitron.megatron.layers import LocalSelfAttention, layer_angles
from nemo_minitron.megatron.model import outside_inference_mode, unwrap


@dataclass
class Progress:
    """Where the next tokens stand; shared by all layers of a model, and set before each pass."""

    positions: Tensor | None = None
    """`[B, S]`; None for prompts, which begin at position 0."""
    end: int = 0
    """The position after the last one."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def move_to(self, positions: Tensor | None, end: int) -> None:
        """Set the positions of the next pass."""
        self.positions, self.end = positions, end
        self._masks.clear()

    def mask(self, window: int | None) -> Tensor:
        """Which cached positions each query sees, `[B, 1, S, end]` bool."""
        assert self.positions is not None
        if window not in self._masks:
            queries = self.positions[:, None, :, None]
            keys = torch.arange(self.end, device=queries.device)
            seen = keys <= queries
            self._masks[window] = seen if window is None else seen & (keys > queries - window)
        return self._masks[window]


class KeyValueCache:
    """One layer's rotated keys and its values, `[B, G, L, D]` each.

    Args:
        attention: The layer's attention.
        angles: Rotary angles of all L positions, `[L, 1, 1, rotated]`.
        samples: B.
        dtype: Of keys and values.
        progress: Where the next tokens stand.
    """

    def __init__(
        self, attention: LocalSelfAttention, angles: Tensor, *, samples: int, dtype: torch.dtype, progress: Progress
    ) -> None:
        groups, head_dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        shape = (samples, groups, angles.shape[0], head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=angles.device)
        self.values = torch.zeros_like(self.keys)
        self.tables = rotary_tables(angles, dtype)
        self.progress = progress

    def attend(
        self, qkv: Tensor, *, groups: int, head_dim: int, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Attention of the new positions to all before them, and to themselves; they join the cache.

        Args:
            qkv: `[S, B, G * (R + 2) * D]` as in `functional.causal_attention`.
            groups: G.
            head_dim: D.
            scale: Factor of the scores; None: `1 / sqrt(D)`.
            window: Positions that a query sees, its own and those before; None: all.

        Returns:
            `[S, B, G * R * D]`.
        """
        length, batch, width = qkv.shape
        heads = qkv.view(length, batch, groups, width // groups // head_dim, head_dim).permute(1, 2, 3, 0, 4)
        if self.progress.positions is None:
            tables = tuple(table[:length] for table in self.tables)
            self.keys[:, :, :length] = _rotate(heads[:, :, -2], *tables)
            self.values[:, :, :length] = heads[:, :, -1]
            return causal_attention(
                qkv, (tables[0], tables[1]), groups=groups, head_dim=head_dim, scale=scale, window=window
            )
        positions, end = self.progress.positions, self.progress.end
        cosines, sines = (table[positions][:, None, None] for table in self.tables)  # [B, 1, 1, S, rotated]
        turned = _rotate(heads[:, :, :-1], cosines, sines)
        place = (
            torch.arange(batch, device=qkv.device)[:, None, None],
            torch.arange(groups, device=qkv.device)[None, :, None],
            positions[:, None, :],
        )
        self.keys[place], self.values[place] = turned[:, :, -1], heads[:, :, -1]
        out = F.scaled_dot_product_attention(
            turned[:, :, :-1].flatten(1, 2),
            self.keys[:, :, :end],
            self.values[:, :, :end],
            attn_mask=self.progress.mask(window),
            scale=head_dim**-0.5 if scale is None else scale,
            enable_gqa=True,
        )
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1)


def can_cache(chunks: Sequence[nn.Module]) -> bool:
    """Whether all layers on this rank are our own; those of Transformer Engine have no such cache."""
    return all(isinstance(layer.self_attention, LocalSelfAttention) for layer in _layers(chunks))


@contextmanager
def cached(chunks: Sequence[nn.Module], *, samples: int, length: int) -> Iterator[Progress]:
    """A block in which the layers remember what they have read.

    Args:
        chunks: This rank's model chunks, for which `can_cache` holds.
        samples: Samples of every pass in the block.
        length: Positions to make room for.

    Yields:
        What to tell where the tokens of the next pass stand.
    """
    progress = Progress()
    try:
        with outside_inference_mode():
            for chunk in chunks:
                model = unwrap(chunk)
                angles = model.rotary_pos_emb(length)
                dtype = next(model.parameters()).dtype
                for layer in model.decoder.layers:
                    attention = layer.self_attention
                    assert isinstance(attention, LocalSelfAttention), "can_cache holds"
                    attention.cache = KeyValueCache(
                        attention, layer_angles(attention, angles), samples=samples, dtype=dtype, progress=progress
                    )
        yield progress
    finally:
        for layer in _layers(chunks):
            layer.self_attention.cache = None


def _layers(chunks: Sequence[nn.Module]) -> Iterator[Any]:
    for chunk in chunks:
        yield from unwrap(chunk).decoder.layers


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn channel pairs `(i, i + rotated / 2)` of `[..., S, D]`; the first half of the sines comes negated."""
    rotated = cosines.shape[-1]
    part = x[..., :rotated]
    swapped = torch.cat([part[..., rotated // 2 :], part[..., : rotated // 2]], dim=-1)
    turned = torch.addcmul(swapped * sines, part, cosines)
    return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], dim=-1)
