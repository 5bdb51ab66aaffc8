"""Cross-entropy over the whole vocabulary with the output layer inside; the sibling of `fused_linear_kl`.

Shapes: N tokens, h hidden size, V this rank's shard of the (padded) vocabulary, R ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.parallel.collectives import gather, split_group
from nemo_minitron.parallel.fused_linear import (
    LinearGradient,
    Tokens,
    block_rows,
    chunk_rows,
    label_columns,
    label_logits,
    labelled,
    pieces,
    project,
    row_max,
    scaled,
    share,
    wide_dtype,
    widened,
)
from nemo_minitron.parallel.vocab import real_columns


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
) -> FusedCrossEntropy:
    """Sum of -log p(label) over kept tokens, without a `[tokens, vocabulary]` tensor.

    Gradients, precision, masking and the arguments are those of `fused_linear_kl`. A kept token whose label is no
    token of the vocabulary makes the sum NaN.

    Args:
        hidden: `[N, h]` after the final norm, the same on every tensor-parallel rank.
        weight: `[V, h]`, rank r holding tokens `r * V` and following.
        labels: `[N]` token ids.
        keep: `[N]` bool; None keeps all.
        vocab_size: Real tokens; columns beyond it carry no probability.
        chunk_tokens: Tokens a chunk; None takes what `fused_linear.CHUNK_BYTES` allows.
        tp: Ranks that share the vocabulary.
    """
    tokens = Tokens.select(hidden.shape[0], keep, hidden.device)
    grad = torch.is_grad_enabled()
    job = _Job(
        labels=tokens.of(labels),
        tokens=tokens,
        real=real_columns(weight.shape[0], vocab_size=vocab_size, tp=tp),
        chunk_tokens=chunk_tokens,
        tp=split_group(tp),
        wanted=(grad and hidden.requires_grad, grad and weight.requires_grad),
    )
    ce_sum, correct = _FusedLinearCrossEntropy.apply(hidden, weight, job)  # type: ignore[no-untyped-call]
    return FusedCrossEntropy(ce_sum, tokens.count, correct)


@dataclass(frozen=True, slots=True)
class _Job:
    labels: Tensor
    tokens: Tokens
    real: int
    chunk_tokens: int | None
    tp: ProcessGroup | None
    wanted: tuple[bool, bool]


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, all_hidden: Tensor, all_weight: Tensor, job: _Job) -> tuple[Tensor, ...]:
        columns = all_weight.shape[0]
        hidden, weight = job.tokens.of(all_hidden), all_weight[: job.real]
        rows = chunk_rows(hidden.shape[0], columns, hidden.dtype, job.chunk_tokens)
        gradient = LinearGradient.begin(hidden, weight, wanted=job.wanted, several=rows < hidden.shape[0])
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        for chunk in pieces(hidden.shape[0], rows):
            logits = project("student", hidden[chunk], weight)
            local, mine = label_columns(job.labels[chunk], columns=columns, real=job.real, tp=job.tp)
            values = torch.zeros(4, logits.shape[0], dtype=wide_dtype(logits.dtype), device=logits.device)
            values[2], values[3] = label_logits(logits, local, mine), mine
            for block in pieces(logits.shape[0], block_rows(logits.shape[0], columns, hidden.device, job.tp)):
                _block(logits[block], values[:, block], local[block], job, want_gradient=gradient.wanted)
            sums += _token_sums(gather(values, job.tp).double())
            gradient.add(chunk, logits)
        ctx.save_for_backward(*gradient.finish(job.tokens, columns, job.tp))
        ce_sum, correct = (value.clone() for value in sums.to(wide_dtype(hidden.dtype)).unbind())
        ctx.mark_non_differentiable(correct)
        return ce_sum, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return scaled(d_hidden, grads[0]), scaled(d_weight, grads[0]), None


def _block(logits: Tensor, values: Tensor, local: Tensor, job: _Job, *, want_gradient: bool) -> None:
    """Fill in peak and mass of a block of tokens and turn its logits into their gradient, in place."""
    s = widened("student block", logits)
    peak, mass, _, found = values
    row_max(s, peak)
    torch.sum(s.sub_(peak.unsqueeze(1)).exp_(), -1, out=mass)
    if want_gradient and s.shape[1]:
        s.mul_(share(peak, mass, job.tp).unsqueeze(1))
        s.scatter_add_(1, local.unsqueeze(1), -found.unsqueeze(1))
        if s is not logits:
            logits.copy_(s)
    elif want_gradient:
        share(peak, mass, job.tp)  # the other ranks wait for this one, whose shard is all padding


def _token_sums(values_RKN: Tensor) -> Tensor:
    peak, mass, label, found = values_RKN.unbind(1)
    cross_entropy = torch.logsumexp(peak + mass.log(), 0) - label.sum(0)
    correct = (label.sum(0) == peak.amax(0)).sum()
    return torch.stack([labelled(cross_entropy, found).sum(), correct.to(cross_entropy.dtype)])
