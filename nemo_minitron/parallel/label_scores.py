"""What a model says of each label, token by token, with the output layer inside.

The forward-only sibling of `fused_linear_cross_entropy`, for losses that are not one sum over all tokens. Without a
gradient the logits need not outlive the sum over them, so they are formed in tiles of tokens and columns, which is
faster where caches are small.

Shapes: N tokens, h hidden size, V this rank's shard of the (padded) vocabulary, R ranks, T tiles of columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.parallel.collectives import gather
from nemo_minitron.parallel.fused_linear import (
    OutputLayer,
    label_columns,
    labelled,
    pieces,
    project,
    row_max,
    wide_dtype,
    widened,
)

TILE_TOKENS = 2048
"""Tokens that a matrix product with the output layer takes at one time; fewer at a time cost more a token."""
_TILE_COLUMNS = {"cpu": 4096}
_TILE_COLUMNS_ELSEWHERE = 32768


@dataclass(frozen=True, slots=True)
class LabelScores:
    """By token, the same on every tensor-parallel rank."""

    nats: Tensor
    """-log p(label) `[N]`, float64; 0 where masked, NaN where a kept token's label is no token of the vocabulary."""
    correct: Tensor
    """Whether the label has the largest logit `[N]`, bool; False where masked."""


@torch.no_grad()
def label_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    keep: Tensor | None = None,
    *,
    vocab_size: int,
    tile: tuple[int, int] | None = None,
    tp: ProcessGroup | None = None,
) -> LabelScores:
    """Score labels without a `[tokens, vocabulary]` tensor; no gradient.

    Arguments are those of `fused_linear_kd`. `tile` is how many tokens and columns have logits at one time; None
    chooses.
    """
    rows, width = tile or (TILE_TOKENS, _TILE_COLUMNS.get(hidden.device.type, _TILE_COLUMNS_ELSEWHERE))
    layer = OutputLayer.of(hidden, weight, keep, vocab_size, None, tp)
    kept_hidden, kept_labels = layer.tokens.of(hidden), layer.tokens.of(labels)
    nats, correct = [kept_hidden.new_zeros(0, dtype=torch.float64)], [labels.new_zeros(0, dtype=torch.bool)]
    for chunk in pieces(kept_hidden.shape[0], rows):
        local, mine = label_columns(kept_labels[chunk], columns=layer.columns, real=layer.real, tp=layer.tp)
        values = _tiles(kept_hidden[chunk], weight, local, layer, width)
        values[2] *= mine
        peak, mass, label = gather(values, layer.tp).double().transpose(0, 1).flatten(1, 2)
        found = gather(mine.to(peak.dtype), layer.tp)
        nats.append(labelled(torch.logsumexp(peak + mass.log(), 0) - label.sum(0), found))
        correct.append(label.sum(0) == peak.amax(0))
    return LabelScores(layer.tokens.spread(torch.cat(nats)), layer.tokens.spread(torch.cat(correct)))


def _tiles(hidden: Tensor, weight: Tensor, local: Tensor, layer: OutputLayer, width: int) -> Tensor:
    """Peak, mass above it, and the label's logit if it is there, of each tile of this rank's columns: `[3, T, rows]`.

    Every rank has equally many tiles; those beyond the real columns hold nothing.
    """
    tiles = list(pieces(layer.columns, width))
    values = torch.zeros(3, len(tiles), hidden.shape[0], dtype=wide_dtype(hidden.dtype), device=hidden.device)
    for index, tile in enumerate(tiles):
        peak, mass, label = values[:, index]
        logits = project("student", hidden, weight[tile.start : max(tile.start, min(tile.stop, layer.real))])
        s = widened("student block", logits)
        row_max(s, peak)
        if s.shape[1]:
            inside = (local >= tile.start) & (local < tile.start + s.shape[1])
            column = torch.where(inside, local - tile.start, 0).unsqueeze(1)
            label.copy_(torch.where(inside, s.gather(1, column).squeeze(1), 0))
            torch.sum(s.sub_(peak.unsqueeze(1)).exp_(), -1, out=mass)
    return values
