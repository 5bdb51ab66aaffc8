"""Forward KL between teacher and student over the whole vocabulary, with both output layers inside.

    KL = T^2 * sum over kept tokens of KL(softmax(teacher_hidden @ teacher_weight.T / T)
                                          || softmax(student_hidden @ student_weight.T / T))
    loss = kd_weight * KL + lm_weight * (the student's cross-entropy with the labels, at temperature 1)

Per token, with p and q the two distributions and t, s the logits over T,
`KL = sum p (t - s) - logsumexp(t) + logsumexp(s)`, and its gradient with respect to the student's logits is `T (q - p)`
after the factor T^2. Both need nothing but the logits of the token itself, so value and gradient are made chunk by
chunk in the forward pass and no `[tokens, vocabulary]` tensor ever exists. Source of the loss: Hinton et al.,
arXiv:1503.02531, sec. 2; Muralidharan et al., arXiv:2407.14679, sec. 3.

Shapes: N tokens, h and H hidden sizes, V this rank's shard of the (padded) vocabulary, R ranks.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.parallel.collectives import gather, split_group
from nemo_minitron.parallel.fused_linear import (
    WORKSPACE,
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
class FusedLoss:
    """Sums over kept tokens, the same on every tensor-parallel rank. Divide by the global number of tokens, once."""

    loss_sum: Tensor
    """`kd_weight * KL + lm_weight * CE`: scalar in nats, with gradient; float32, or float64 for float64 states."""
    kl_sum: Tensor
    """The KL alone, with its T^2. Detached, like all below."""
    tokens: Tensor
    """Number of kept tokens, int64."""
    student_ce_sum: Tensor | None = None
    """-log p(label) of the student at temperature 1; None without `statistics` and labels."""
    teacher_ce_sum: Tensor | None = None
    top1_agreement: Tensor | None = None
    """How many tokens the student's best token is the teacher's best (the lowest id among the teacher's equals)."""


def fused_linear_kl(  # noqa: PLR0917 - two pairs and their mask and labels, in the order of the formula
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    keep: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    vocab_size: int,
    chunk_tokens: int | None = None,
    tp: ProcessGroup | None = None,
    statistics: bool = False,
) -> FusedLoss:
    """The distillation loss of a micro-batch and, if wanted, what one monitors beside it.

    Gradients reach `student_hidden` (summed over `tp` here: the caller must not reduce it again) and `student_weight`
    (of this rank's rows); a tied weight collects its other gradient through autograd as usual. The teacher gets none.
    Logits have the dtype of their operands; softmax, differences and sums are float32 (float64 for float64). Without
    grad mode, or when neither student argument needs a gradient, that half of the work is left out.

    Args:
        student_hidden: `[N, h]` after the final norm, the same on every tensor-parallel rank.
        student_weight: `[V, h]`, rank r holding tokens `r * V` and following.
        teacher_hidden: `[N, H]`, the same on every tensor-parallel rank.
        teacher_weight: `[V, H]`, split as the student's.
        keep: `[N]` bool, tokens that count; None keeps all. The others are not computed, and may hold NaN.
            All False gives 0 with a graph.
        labels: `[N]` token ids, for the cross-entropies of `lm_weight` and `statistics`.
        temperature: T above.
        kd_weight: Factor of the KL.
        lm_weight: Factor of the student's cross-entropy; above 0 it needs `labels`.
        vocab_size: Real tokens; columns beyond it carry no probability and receive a gradient of 0.
        chunk_tokens: Tokens a chunk; None takes what `fused_linear.CHUNK_BYTES` allows.
        tp: Ranks that share the vocabulary.
        statistics: Also count top-1 agreement and, given labels, both cross-entropies.
    """
    tokens = Tokens.select(student_hidden.shape[0], keep, student_hidden.device)
    grad = torch.is_grad_enabled()
    if lm_weight and labels is None:
        raise ValueError("lm_weight above 0 needs labels")
    job = _Job(
        teacher_hidden=tokens.of(teacher_hidden.detach()),
        teacher_weight=teacher_weight.detach(),
        labels=tokens.of(labels) if labels is not None and (statistics or lm_weight) else None,
        tokens=tokens,
        temperature=temperature,
        kd_weight=kd_weight,
        lm_weight=lm_weight,
        real=real_columns(student_weight.shape[0], vocab_size=vocab_size, tp=tp),
        chunk_tokens=chunk_tokens,
        tp=split_group(tp),
        statistics=statistics,
        wanted=(grad and student_hidden.requires_grad, grad and student_weight.requires_grad),
    )
    sums = _FusedLinearKL.apply(student_hidden, student_weight, job)  # type: ignore[no-untyped-call]
    loss_sum, kl_sum, agreement, student_ce, teacher_ce = sums
    if not statistics:
        return FusedLoss(loss_sum, kl_sum, tokens.count)
    if labels is None:
        return FusedLoss(loss_sum, kl_sum, tokens.count, top1_agreement=agreement)
    return FusedLoss(loss_sum, kl_sum, tokens.count, student_ce, teacher_ce, agreement)


@dataclass(frozen=True, slots=True)
class _Job:
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor | None
    tokens: Tokens
    temperature: float
    kd_weight: float
    lm_weight: float
    real: int
    """Columns of this rank's shard that belong to real tokens."""
    chunk_tokens: int | None
    tp: ProcessGroup | None
    statistics: bool
    wanted: tuple[bool, bool]


class _FusedLinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_hidden: Tensor, student_weight: Tensor, job: _Job) -> tuple[Tensor, ...]:
        columns = student_weight.shape[0]
        hidden, weight = job.tokens.of(student_hidden), student_weight[: job.real]
        rows = chunk_rows(hidden.shape[0], columns, hidden.dtype, job.chunk_tokens)
        gradient = LinearGradient.begin(hidden, weight, wanted=job.wanted, several=rows < hidden.shape[0])
        sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
        for chunk in pieces(hidden.shape[0], rows):
            student = project("student", hidden[chunk], weight)
            teacher = project("teacher", job.teacher_hidden[chunk], job.teacher_weight[: job.real])
            values = _new_values(student)
            if job.labels is not None:
                local, mine = label_columns(job.labels[chunk], columns=columns, real=job.real, tp=job.tp)
                _pick_labels(values, student, teacher, local, mine)
            for block in pieces(student.shape[0], block_rows(student.shape[0], columns, hidden.device, job.tp)):
                _block(student[block], teacher[block], values[:, block], job, want_gradient=gradient.wanted)
            if gradient.wanted and job.labels is not None and job.lm_weight and job.real:
                # The one-hot target of the cross-entropy; the block has done the softmax's part.
                student.scatter_add_(1, local.unsqueeze(1), mine.unsqueeze(1).to(student.dtype).mul_(-job.lm_weight))
            sums += _token_sums(gather(values, job.tp).double(), job)
            gradient.add(chunk, student)
        ctx.save_for_backward(*gradient.finish(job.tokens, columns, job.tp))
        loss_sum = job.kd_weight * sums[0] + job.lm_weight * sums[2]
        wide = torch.cat([loss_sum[None], sums]).to(wide_dtype(hidden.dtype))
        loss_sum, *rest = (value.clone() for value in wide.unbind())
        ctx.mark_non_differentiable(*rest)
        return loss_sum, *rest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return scaled(d_hidden, grads[0]), scaled(d_weight, grads[0]), None


class _Value(IntEnum):
    """What is kept of each token: numbers of this rank's shard, from which those of the whole vocabulary follow."""

    TEACHER_PEAK = 0  # largest logit, before the temperature
    TEACHER_MASS = 1  # sum of exp((logit - peak) / T)
    STUDENT_PEAK = 2
    STUDENT_MASS = 3
    CROSS = 4  # sum of exp(t) (t - s), where t and s are (logit - peak) / T
    STUDENT_AT_TOP = 5  # the student's logit at the teacher's largest
    TEACHER_LABEL = 6  # the label's logit, 0 if it is another rank's
    STUDENT_LABEL = 7
    LABEL_FOUND = 8
    TEACHER_MASS_1 = 9  # the masses at temperature 1
    STUDENT_MASS_1 = 10


def _new_values(logits: Tensor) -> Tensor:
    return torch.zeros(len(_Value), logits.shape[0], dtype=wide_dtype(logits.dtype), device=logits.device)


def _pick_labels(values: Tensor, student: Tensor, teacher: Tensor, local: Tensor, mine: Tensor) -> None:
    values[_Value.STUDENT_LABEL] = label_logits(student, local, mine)
    values[_Value.TEACHER_LABEL] = label_logits(teacher, local, mine)
    values[_Value.LABEL_FOUND] = mine


def _block(student: Tensor, teacher: Tensor, values: Tensor, job: _Job, *, want_gradient: bool) -> None:
    """Fill in the values of a block of tokens and turn the student's logits into their gradient, in place."""
    s, t = widened("student block", student), widened("teacher block", teacher)
    p = WORKSPACE.take("probabilities", (s.shape[0], s.shape[1]), s.dtype, s.device)
    cold = None  # the student's softmax at temperature 1, where the loss needs it beside the one at T
    _peaks(s, t, values, statistics=job.statistics)
    s.sub_(values[_Value.STUDENT_PEAK].unsqueeze(1))
    t.sub_(values[_Value.TEACHER_PEAK].unsqueeze(1))
    if job.temperature != 1:
        if job.labels is not None:
            torch.sum(torch.exp(t, out=p), -1, out=values[_Value.TEACHER_MASS_1])
            torch.sum(torch.exp(s, out=p), -1, out=values[_Value.STUDENT_MASS_1])
            cold = p.clone() if want_gradient and job.lm_weight else None
        s.mul_(1 / job.temperature)
        t.mul_(1 / job.temperature)
    torch.sum(torch.exp(t, out=p), -1, out=values[_Value.TEACHER_MASS])
    torch.sum(t.sub_(s).mul_(p), -1, out=values[_Value.CROSS])
    torch.sum(s.exp_(), -1, out=values[_Value.STUDENT_MASS])
    if not want_gradient:
        return
    peaks = values[: _Value.STUDENT_PEAK + 1 : 2] / job.temperature
    teacher_share, student_share = share(peaks, values[_Value.TEACHER_MASS : _Value.STUDENT_MASS + 1 : 2], job.tp)
    weight = job.kd_weight * job.temperature
    student_weight = weight + (job.lm_weight if cold is None else 0)
    s.mul_((student_share * student_weight).unsqueeze(1)).addcmul_(p, (teacher_share * weight).unsqueeze(1), value=-1)
    if cold is not None:
        rows = slice(_Value.STUDENT_PEAK, _Value.STUDENT_PEAK + 1), slice(_Value.STUDENT_MASS_1, None)
        (cold_share,) = share(values[rows[0]], values[rows[1]], job.tp)
        s.addcmul_(cold, (cold_share * job.lm_weight).unsqueeze(1))
    if s is not student:
        student.copy_(s)


def _peaks(s: Tensor, t: Tensor, values: Tensor, *, statistics: bool) -> None:
    row_max(s, values[_Value.STUDENT_PEAK])
    if statistics and t.shape[1]:
        top = t.max(-1)
        values[_Value.TEACHER_PEAK] = top.values
        values[_Value.STUDENT_AT_TOP] = s.gather(1, top.indices.unsqueeze(1)).squeeze(1)
    else:
        row_max(t, values[_Value.TEACHER_PEAK])


def _token_sums(values_RKN: Tensor, job: _Job) -> Tensor:
    """KL, agreement, student and teacher cross-entropy of the whole vocabulary, summed over a chunk's tokens."""
    v = dict(zip(_Value, values_RKN.unbind(1), strict=True))
    t_peak, s_peak = v[_Value.TEACHER_PEAK], v[_Value.STUDENT_PEAK]
    scale = 1 / job.temperature
    t_log_z = torch.logsumexp(t_peak * scale + v[_Value.TEACHER_MASS].log(), 0)
    s_log_z = torch.logsumexp(s_peak * scale + v[_Value.STUDENT_MASS].log(), 0)
    # Sum of p (t - s): each rank's part was taken with its own two peaks subtracted.
    parts = v[_Value.CROSS] + (t_peak - s_peak) * scale * v[_Value.TEACHER_MASS]
    kl = ((t_peak * scale - t_log_z).exp() * parts).sum(0) - t_log_z + s_log_z
    sums = [kl.sum() * job.temperature**2, kl.new_zeros(()), kl.new_zeros(()), kl.new_zeros(())]
    if job.statistics:
        best_rank = t_peak.max(0).indices.unsqueeze(0)  # the first among equals holds the lowest token ids
        sums[1] = (v[_Value.STUDENT_AT_TOP].gather(0, best_rank).squeeze(0) == s_peak.amax(0)).sum()
    if job.labels is not None:
        if job.temperature != 1:
            t_log_z = torch.logsumexp(t_peak + v[_Value.TEACHER_MASS_1].log(), 0)
            s_log_z = torch.logsumexp(s_peak + v[_Value.STUDENT_MASS_1].log(), 0)
        sums[2] = labelled(s_log_z - v[_Value.STUDENT_LABEL].sum(0), v[_Value.LABEL_FOUND]).sum()
        sums[3] = labelled(t_log_z - v[_Value.TEACHER_LABEL].sum(0), v[_Value.LABEL_FOUND]).sum()
    return torch.stack(sums)
