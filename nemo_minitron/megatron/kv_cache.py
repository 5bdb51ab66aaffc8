"""Keys, values and states of the tokens that a model has read, so that each further token costs one position.

For attention of either kind (`layers.CachingAttention`) and Mamba's mixers (`mamba.LocalMamba`). Transformer Engine's
layers attend by our own function then, between their own linears. Samples of a batch may have prompts of different
lengths: they are padded on the right, each sample counts its own positions, and what a padded position has left in the
cache is written over before any query looks at it.

Shapes: B samples, S new positions, L positions of the cache, G KV groups of this rank, R query heads of a group, D
channels of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from nemo_minitron.megatron.functional import causal_attention, rotary_tables
from nemo_minitron.megatron.layers import CachingAttention, layer_angles
from nemo_minitron.megatron.mamba import LocalMamba, MambaState
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
        self, attention: CachingAttention, angles: Tensor, *, samples: int, dtype: torch.dtype, progress: Progress
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


class MambaCache:
    """A Mamba mixer's state, and the last inputs of its convolution.

    The state behind a padded prompt is made when the first token after it says where each prompt ends. A token at the
    position of the one before takes its place: the interleaved schedule passes each several times.

    Args:
        progress: Where the next tokens stand.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._prompts: Tensor | None = None
        self._before: MambaState | None = None
        self._after: MambaState | None = None
        self._last: Tensor | None = None
        """The position of each sample that `_after` has read, and `_before` has not."""

    def mix(self, mixer: LocalMamba, projected_BSC: Tensor) -> Tensor:
        """What the mixer makes of prompts, or of one more token a sample."""
        if self.progress.positions is None:
            self._prompts, self._last = projected_BSC, None
            return mixer.mix(projected_BSC).output
        positions = self.progress.positions[:, 0]
        if self._last is None:
            assert self._prompts is not None, "prompts come first"
            self._after, self._prompts = _state_of(mixer, self._prompts, positions), None
            self._before = self._after
            self._last = torch.full_like(positions, -1)
        assert self._before is not None
        assert self._after is not None
        again = positions == self._last
        state = MambaState(
            *(
                torch.where(again.view(-1, *[1] * (old.dim() - 1)), old, new)
                for old, new in ((self._before.window, self._after.window), (self._before.state, self._after.state))
            )
        )
        found = mixer.mix(projected_BSC, before=state)
        inner = _convolved(mixer, projected_BSC)
        window = torch.cat([state.window, inner], dim=1)[:, inner.shape[1] :]
        self._before, self._after, self._last = state, MambaState(window, found.state), positions
        return found.output


def _state_of(mixer: LocalMamba, prompts_BSC: Tensor, lengths_B: Tensor) -> MambaState:
    """What a mixer remembers of prompts of so many tokens each, padded on the right."""
    places = torch.arange(prompts_BSC.shape[1], device=prompts_BSC.device)
    state = mixer.mix(prompts_BSC, keep_BS=places < lengths_B[:, None]).state
    taps = mixer.sizes.conv_kernel
    padded = F.pad(_convolved(mixer, prompts_BSC), (0, 0, taps - 1, 0))
    last = lengths_B[:, None] + torch.arange(taps - 1, device=lengths_B.device)
    return MambaState(padded[torch.arange(len(padded), device=padded.device)[:, None], last], state)


def _convolved(mixer: LocalMamba, projected_BSC: Tensor) -> Tensor:
    """The channels that the convolution passes over."""
    first = mixer.parts["z"]
    return projected_BSC[..., first : first + mixer.convolved]


def can_cache(chunks: Sequence[nn.Module]) -> bool:
    """Whether each rank sees all positions; one token cannot be split over ranks."""
    config = unwrap(chunks[0]).config
    return not config.sequence_parallel and config.context_parallel_size == 1


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
                for mixer in _mixers([chunk]):
                    mixer.cache = (
                        MambaCache(progress)
                        if isinstance(mixer, LocalMamba)
                        else KeyValueCache(
                            mixer, layer_angles(mixer, angles), samples=samples, dtype=dtype, progress=progress
                        )
                    )
        yield progress
    finally:
        for mixer in _mixers(chunks):
            mixer.cache = None


def _mixers(chunks: Sequence[nn.Module]) -> Iterator[CachingAttention | LocalMamba]:
    for chunk in chunks:
        for layer in unwrap(chunk).decoder.layers:
            mixer: nn.Module = layer.self_attention
            if isinstance(mixer, CachingAttention | LocalMamba):
                yield mixer


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn channel pairs `(i, i + rotated / 2)` of `[..., S, D]`; the first half of the sines comes negated."""
    rotated = cosines.shape[-1]
    part = x[..., :rotated]
    swapped = torch.cat([part[..., rotated // 2 :], part[..., : rotated // 2]], dim=-1)
    turned = torch.addcmul(swapped * sines, part, cosines)
    return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], dim=-1)
