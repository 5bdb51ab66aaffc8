"""Losses on logits whose vocabulary is split across tensor-parallel ranks.

Shapes: `...V` where V is this rank's shard of the (padded) vocabulary; rank r owns tokens `r * V` and following. Per
token results are `...` and the same on every rank. One formula for every world size, in value and in gradient; inputs
are never changed. Computed in float32, or float64 for float64 logits.

These are the dense forms, which hold several `[tokens, V]` tensors. Training uses `fused_linear_kd`,
`fused_linear_sparse_kd` and `fused_linear_cross_entropy`, which hold none and are tested against these.
"""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.collectives import gather, group_rank
from nemo_minitron.parallel.vocab import real_columns
from tests.oracles.collectives import identity_fwd_sum_bwd, max_over, sum_fwd_identity_bwd


def mask_padding(logits: Tensor, *, vocab_size: int, tp: ProcessGroup | None) -> Tensor:
    """The logits with -inf in the columns that pad the vocabulary, so that these carry no probability."""
    real = real_columns(logits.shape[-1], vocab_size=vocab_size, tp=tp)
    if real == logits.shape[-1]:
        return logits
    padding = torch.arange(logits.shape[-1], device=logits.device) >= real
    return logits.masked_fill(padding, -math.inf)


def vocab_log_softmax(logits: Tensor, *, tp: ProcessGroup | None) -> Tensor:
    """Log-probabilities over the complete vocabulary; the result is split as the logits are."""
    logits = _wide(logits)
    peak = max_over(logits.amax(-1, keepdim=True), tp)  # no gradient through the shift
    shifted = logits - peak
    log_z = sum_fwd_identity_bwd(shifted.exp().sum(-1, keepdim=True), tp).log()
    return shifted - identity_fwd_sum_bwd(log_z, tp)


def vocab_cross_entropy(logits: Tensor, labels: Tensor, *, tp: ProcessGroup | None) -> Tensor:
    """-log p(label) of every token in nats. `labels` are global token ids."""
    logp = vocab_log_softmax(logits, tp=tp)
    local = labels - group_rank(tp) * logits.shape[-1]
    mine = (local >= 0) & (local < logits.shape[-1])
    column = torch.where(mine, local, 0).unsqueeze(-1)
    picked = torch.where(mine, logp.gather(-1, column).squeeze(-1), 0)
    return -sum_fwd_identity_bwd(picked, tp)


def vocab_divergence(
    student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence, *, tp: ProcessGroup | None
) -> Tensor:
    """`T^2 D(softmax(teacher / T), softmax(student / T))` of every token in nats."""
    student, teacher = (
        vocab_log_softmax(_wide(logits) / divergence.temperature, tp=tp) for logits in (student_logits, teacher_logits)
    )
    return sum_fwd_identity_bwd(divergence.per_token(student, teacher), tp)


def vocab_sparse_divergence(
    student_logits: Tensor, targets: SparseTargets, divergence: Divergence, *, tp: ProcessGroup | None
) -> Tensor:
    """The same between the targets' entries, with their tail, and the student's probabilities of the same buckets.

    Logits are `[N, V]`; the temperature is that of the targets.
    """
    logp = vocab_log_softmax(_wide(student_logits) / divergence.temperature, tp=tp)
    first = group_rank(tp) * logp.shape[1]
    mine = (targets.ids >= first) & (targets.ids < first + logp.shape[1])
    column = torch.where(mine, targets.ids - first, 0).long()
    picked = sum_fwd_identity_bwd(torch.where(mine, logp.gather(1, column), 0), tp)
    taken = torch.zeros_like(logp).scatter_add_(1, column, mine.to(logp.dtype)) > 0
    rest = sum_fwd_identity_bwd(torch.where(taken, 0, logp.exp()).sum(1, keepdim=True), tp)
    # Where every id is taken the tail is impossible; its logarithm must not be differentiated.
    tail = torch.where(rest > 0, torch.where(rest > 0, rest, 1).log(), -math.inf)
    student = torch.cat([torch.where(targets.ids >= 0, picked, -math.inf), tail], 1)
    return divergence.per_token(student, targets.bucket_logp(logp.dtype))


def top1_agreement(student_logits: Tensor, teacher_logits: Tensor, *, tp: ProcessGroup | None) -> Tensor:
    """Whether the teacher's best token (the lowest id among equals) is one of the student's best; bool, per token."""
    teacher_best = teacher_logits.max(-1)
    student_there = student_logits.gather(-1, teacher_best.indices.unsqueeze(-1)).squeeze(-1)
    rows = gather(torch.stack([_wide(x) for x in (teacher_best.values, student_there, student_logits.amax(-1))]), tp)
    best_rank = rows[:, 0].max(0).indices  # the first among equals, which holds the lowest ids
    chosen = rows[:, 1].gather(0, best_rank.unsqueeze(0)).squeeze(0)
    return chosen == rows[:, 2].amax(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
