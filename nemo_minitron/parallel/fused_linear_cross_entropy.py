"""Cross-entropy over the complete vocabulary with the output layer inside; the sibling of `fused_linear_kd`.

Shapes: N tokens, h hidden size, V this rank's shard of the (padded) vocabulary, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.kernels.available import kernels_run
from nemo_minitron.parallel.collectives import gather
from nemo_minitron.parallel.fused_linear import (
    OutputLayer,
    label_columns,
    label_logits,
    labelled,
    row_max,
    share,
    wide_dtype,
    widened,
)
from nemo_minitron.parallel.kernel_forms import kernel_cross_entropy


@dataclass(frozen=True, slots=True)
class FusedCrossEntropy:
    """Sums over kept tokens, the same on every tensor-parallel rank. Divide by the global number of tokens, once."""

    ce_sum: Tensor
    """Scalar in nats, with gradient; float32, or float64 for float64 states."""
    tokens: Tensor
    """Number of kept tokens, int64."""
    correct: Tensor
    """How many labels have the largest logit; detached."""


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    keep: Tensor | None = None,
    *,
    vocab_size: int,
    chunk_tokens: int | None = None,
    tp: ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
) -> FusedCrossEntropy:
    """Sum of -log p(label) over kept tokens, without a `[tokens, vocabulary]` tensor.

    Gradients, precision, masking and the arguments are those of `fused_linear_kd`. A kept token whose label is no
    token of the vocabulary makes the sum NaN.
    """
    layer = OutputLayer.of(hidden, weight, keep, vocab_size, chunk_tokens, tp, weight_gradient)
    ce_sum, correct = layer.apply(hidden, weight, _ChunkCrossEntropy(layer.tokens.of(labels), layer))
    return FusedCrossEntropy(ce_sum, layer.tokens.count, correct)


@dataclass(frozen=True, slots=True)
class _ChunkCrossEntropy:
    labels: Tensor
    layer: OutputLayer
    logits_held: int = 1
    scratch_held: int = 1
    sums: int = 2

    def __call__(self, logits: Tensor, chunk: slice, *, want_gradient: bool) -> Tensor:
        layer = self.layer
        if kernels_run(logits.device, logits.dtype):
            labels = self.labels[chunk]
            return _token_sums(
                kernel_cross_entropy(
                    logits, labels, first=layer.first, tp=layer.tp, want_gradient=want_gradient
                ).double()
            )
        local, mine = label_columns(self.labels[chunk], columns=layer.columns, real=layer.real, tp=layer.tp)
        values = torch.zeros(4, logits.shape[0], dtype=wide_dtype(logits.dtype), device=logits.device)
        values[2], values[3] = label_logits(logits, local, mine), mine
        for block in layer.blocks(logits):
            _block(logits[block], values[:, block], local[block], layer.tp, want_gradient=want_gradient)
        return _token_sums(gather(values, layer.tp).double())


def _block(logits: Tensor, values: Tensor, local: Tensor, tp: ProcessGroup | None, *, want_gradient: bool) -> None:
    """Fill in peak and mass of a block of tokens and turn its logits into their gradient, in place."""
    s = widened("student block", logits)
    peak, mass, _, found = values
    row_max(s, peak)
    torch.sum(s.sub_(peak.unsqueeze(1)).exp_(), -1, out=mass)
    if want_gradient and s.shape[1]:
        s.mul_(share(peak, mass, tp).unsqueeze(1))
        s.scatter_add_(1, local.unsqueeze(1), -found.unsqueeze(1))
        if s is not logits:
            logits.copy_(s)
    elif want_gradient:
        share(peak, mass, tp)  # the other ranks wait for this one, whose shard is all padding


def _token_sums(values_RKN: Tensor) -> Tensor:
    peak, mass, label, found = values_RKN.unbind(1)
    cross_entropy = torch.logsumexp(peak + mass.log(), 0) - label.sum(0)
    correct = (label.sum(0) == peak.amax(0)).sum()
    return torch.stack([labelled(cross_entropy, found).sum(), correct.to(cross_entropy.dtype)])
