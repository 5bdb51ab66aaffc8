"""What a model says of each label, token by token, with the output layer inside.

The forward-only sibling of `fused_linear_cross_entropy`, for losses that are not one sum over all tokens.

Shapes: N tokens, h hidden size, V this rank's shard of the (padded) vocabulary, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.parallel.collectives import gather
from nemo_minitron.parallel.fused_linear import (
    OutputLayer,
    chunk_rows,
    label_columns,
    label_logits,
    labelled,
    pieces,
    project,
    row_max,
    wide_dtype,
    widened,
)


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
    chunk_tokens: int | None = None,
    tp: ProcessGroup | None = None,
) -> LabelScores:
    """Score labels without a `[tokens, vocabulary]` tensor; no gradient. Arguments: `fused_linear_cross_entropy`."""
    layer = OutputLayer.of(hidden, weight, keep, vocab_size, chunk_tokens, tp)
    kept_hidden, kept_labels = layer.tokens.of(hidden), layer.tokens.of(labels)
    columns = weight[: layer.real]
    nats, correct = [kept_hidden.new_zeros(0, dtype=torch.float64)], [labels.new_zeros(0, dtype=torch.bool)]
    rows = chunk_rows(kept_hidden.shape[0], layer.columns, hidden.dtype.itemsize, chunk_tokens)
    for chunk in pieces(kept_hidden.shape[0], rows):
        values = _values(project("student", kept_hidden[chunk], columns), kept_labels[chunk], layer)
        peak, mass, label, found = gather(values, layer.tp).double().unbind(1)
        nats.append(labelled(torch.logsumexp(peak + mass.log(), 0) - label.sum(0), found))
        correct.append(label.sum(0) == peak.amax(0))
    return LabelScores(layer.tokens.spread(torch.cat(nats)), layer.tokens.spread(torch.cat(correct)))


def _values(logits: Tensor, labels: Tensor, layer: OutputLayer) -> Tensor:
    """Peak, mass above it, the label's logit and whether it is among them, of this rank's columns: `[4, rows]`."""
    local, mine = label_columns(labels, columns=layer.columns, real=layer.real, tp=layer.tp)
    values = torch.zeros(4, logits.shape[0], dtype=wide_dtype(logits.dtype), device=logits.device)
    values[2], values[3] = label_logits(logits, local, mine), mine
    for block in layer.blocks(logits):
        s = widened("student block", logits[block])
        row_max(s, values[0, block])
        torch.sum(s.sub_(values[0, block].unsqueeze(1)).exp_(), -1, out=values[1, block])
    return values
