"""Divergence between teacher and student over the complete vocabulary, with both output layers inside.

    KD = T^2 * sum over kept tokens of D(softmax(teacher_hidden @ teacher_weight.T / T),
                                         softmax(student_hidden @ student_weight.T / T))
    loss = kd_weight * KD + lm_weight * (the student's cross-entropy with the labels, at temperature 1)

D is one of `nemo_minitron.ops.divergence`, the forward KL if nothing is said. Its value and its gradient with respect
to the student's logits need nothing but the logits of the token itself, so both are made chunk by chunk in the forward
pass and no `[tokens, vocabulary]` tensor ever exists. Per token, with p and q the two distributions and t, s the logits
over T: the forward KL is `sum p (t - s) - logsumexp(t) + logsumexp(s)` with the gradient `T (q - p)`; the others are in
`divergence_terms`. Source of the loss: Hinton et al., arXiv:1503.02531, sec. 2; Muralidharan et al., arXiv:2407.14679,
sec. 3.

Shapes: N tokens, h and H hidden sizes, V this rank's shard of the (padded) vocabulary, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.kernels.available import kernels_run
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.parallel.collectives import gather, sum_over
from nemo_minitron.parallel.divergence_terms import divergence_terms
from nemo_minitron.parallel.fused_linear import (
    WORKSPACE,
    OutputLayer,
    label_columns,
    label_logits,
    labelled,
    log_share,
    project,
    row_max,
    share,
    wide_dtype,
    widened,
)
from nemo_minitron.parallel.kernel_forms import KernelDivergence
from nemo_minitron.parallel.token_values import Value


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """Sums over kept tokens, the same on every tensor-parallel rank. Divide by the global number of tokens, once."""

    loss_sum: Tensor
    """`kd_weight * KD + lm_weight * CE`: scalar in nats, with gradient; float32, or float64 for float64 states."""
    kd_sum: Tensor
    """The divergence alone, with its T^2. Detached, like all below."""
    tokens: Tensor
    """Number of kept tokens, int64."""
    student_ce_sum: Tensor | None = None
    """-log p(label) of the student at temperature 1; None without `statistics` and labels."""
    teacher_ce_sum: Tensor | None = None
    top1_agreement: Tensor | None = None
    """How many tokens the student's best token is the teacher's best (the lowest id among the teacher's equals)."""

    def statistics(self) -> dict[str, Tensor]:
        """What was counted besides, by the names that logs have."""
        found = {"ce": self.student_ce_sum, "teacher_ce": self.teacher_ce_sum, "agreement": self.top1_agreement}
        return {name: value for name, value in found.items() if value is not None}


def fused_linear_kd(  # noqa: PLR0917 - two pairs and their mask and labels, in the order of the formula
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    keep: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | None = None,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    vocab_size: int,
    chunk_tokens: int | None = None,
    tp: ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
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
        divergence: D and T above; None is the forward KL at temperature 1.
        kd_weight: Factor of the divergence.
        lm_weight: Factor of the student's cross-entropy; above 0 it needs `labels`.
        vocab_size: Real tokens; columns beyond it carry no probability and receive a gradient of 0.
        chunk_tokens: Tokens per chunk; None takes what the memory set in `fused_linear` allows.
        tp: Ranks that share the vocabulary.
        weight_gradient: `[V, h]`, float32 for bfloat16 weights. The gradient of `student_weight` is added here in the
            forward pass and autograd gets none, which saves a tensor of its size and rounds nothing between
            micro-batches (Megatron's `main_grad`). `loss_sum` must then be differentiated with a factor of 1.
        statistics: Also count top-1 agreement and, given labels, both cross-entropies.
    """
    if lm_weight and labels is None:
        raise ValueError("lm_weight above 0 needs labels")
    layer = OutputLayer.of(student_hidden, student_weight, keep, vocab_size, chunk_tokens, tp, weight_gradient)
    job = _ChunkDivergence(
        teacher_hidden=layer.tokens.of(teacher_hidden.detach()),
        teacher_weight=teacher_weight.detach()[: layer.real],
        labels=layer.tokens.of(labels) if labels is not None and (statistics or lm_weight) else None,
        divergence=divergence or Divergence(),
        kd_weight=kd_weight,
        lm_weight=lm_weight,
        statistics=statistics,
        layer=layer,
    )
    loss_sum, kd_sum, agreement, student_ce, teacher_ce = layer.apply(student_hidden, student_weight, job)
    if not statistics:
        return FusedLoss(loss_sum, kd_sum, layer.tokens.count)
    if labels is None:
        return FusedLoss(loss_sum, kd_sum, layer.tokens.count, top1_agreement=agreement)
    return FusedLoss(loss_sum, kd_sum, layer.tokens.count, student_ce, teacher_ce, agreement)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChunkDivergence:
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor | None
    divergence: Divergence
    kd_weight: float
    lm_weight: float
    statistics: bool
    layer: OutputLayer
    logits_held: int = 2
    scratch_held: int = 4
    sums: int = 5

    def __call__(self, logits: Tensor, chunk: slice, *, want_gradient: bool) -> Tensor:
        layer = self.layer
        teacher = project("teacher", self.teacher_hidden[chunk], self.teacher_weight)
        if kernels_run(logits.device, logits.dtype):
            labels = None if self.labels is None else self.labels[chunk]
            return _token_sums(self._kernels()(logits, teacher, labels, want_gradient=want_gradient).double(), self)
        values = torch.zeros(len(Value), logits.shape[0], dtype=wide_dtype(logits.dtype), device=logits.device)
        if self.labels is not None:
            local, mine = label_columns(self.labels[chunk], columns=layer.columns, real=layer.real, tp=layer.tp)
            values[Value.STUDENT_LABEL] = label_logits(logits, local, mine)
            values[Value.TEACHER_LABEL] = label_logits(teacher, local, mine)
            values[Value.LABEL_FOUND] = mine
        for block in layer.blocks(logits):
            _block(logits[block], teacher[block], values[:, block], self, want_gradient=want_gradient)
        if want_gradient and self.labels is not None and self.lm_weight and layer.real:
            # The one-hot target of the cross-entropy; the block has done the softmax's part.
            logits.scatter_add_(1, local.unsqueeze(1), mine.unsqueeze(1).to(logits.dtype).mul_(-self.lm_weight))
        return _token_sums(gather(values, layer.tp).double(), self)

    def _kernels(self) -> KernelDivergence:
        return KernelDivergence(
            divergence=self.divergence,
            kd_weight=self.kd_weight,
            lm_weight=self.lm_weight,
            top=self.statistics,
            first=self.layer.first,
            tp=self.layer.tp,
        )


def _block(student: Tensor, teacher: Tensor, values: Tensor, job: _ChunkDivergence, *, want_gradient: bool) -> None:
    """Fill in the values of a block of tokens and turn the student's logits into their gradient, in place."""
    s, t = widened("student block", student), widened("teacher block", teacher)
    p = WORKSPACE.take("probabilities", (s.shape[0], s.shape[1]), s.dtype, s.device)
    softmax_t1 = None  # the student's softmax at temperature 1, where the loss needs it beside the one at T
    temperature = job.divergence.temperature
    _peaks(s, t, values, statistics=job.statistics)
    s.sub_(values[Value.STUDENT_PEAK].unsqueeze(1))
    t.sub_(values[Value.TEACHER_PEAK].unsqueeze(1))
    if temperature != 1:
        if job.labels is not None:
            torch.sum(torch.exp(t, out=p), -1, out=values[Value.TEACHER_MASS_1])
            torch.sum(torch.exp(s, out=p), -1, out=values[Value.STUDENT_MASS_1])
            softmax_t1 = p.clone() if want_gradient and job.lm_weight else None
        s.mul_(1 / temperature)
        t.mul_(1 / temperature)
    torch.sum(torch.exp(t, out=p), -1, out=values[Value.TEACHER_MASS])
    tempered_lm_weight = job.lm_weight if softmax_t1 is None else 0.0
    if job.divergence.kind is DivergenceKind.FORWARD_KL:
        _forward_kl(s, t, p, values, job, lm_weight=tempered_lm_weight, want_gradient=want_gradient)
    else:
        _other_divergence(s, t, p, values, job, lm_weight=tempered_lm_weight, want_gradient=want_gradient)
    if not want_gradient:
        return
    if softmax_t1 is not None:
        rows = slice(Value.STUDENT_PEAK, Value.STUDENT_PEAK + 1), slice(Value.STUDENT_MASS_1, None)
        (inv_partition_t1,) = share(values[rows[0]], values[rows[1]], job.layer.tp)
        s.addcmul_(softmax_t1, (inv_partition_t1 * job.lm_weight).unsqueeze(1))
    if s is not student:
        student.copy_(s)


def _forward_kl(
    s: Tensor,
    t: Tensor,
    p: Tensor,
    values: Tensor,
    job: _ChunkDivergence,
    *,
    lm_weight: float,
    want_gradient: bool,
) -> None:
    """The one divergence whose gradient needs no sum over the vocabulary but the two masses.

    `s` and `t`: logits over T, less the shard's peak; `p`: exp(t). Leaves the gradient in `s`.
    """
    torch.sum(t.sub_(s).mul_(p), -1, out=values[Value.TERMS])
    torch.sum(s.exp_(), -1, out=values[Value.STUDENT_MASS])
    if not want_gradient:
        return
    teacher_share, student_share = share(*_peaks_and_masses(values, job), job.layer.tp)
    weight = job.kd_weight * job.divergence.temperature
    s.mul_((student_share * (weight + lm_weight)).unsqueeze(1))
    s.addcmul_(p, (teacher_share * weight).unsqueeze(1), value=-1)


def _other_divergence(
    s: Tensor,
    t: Tensor,
    p: Tensor,
    values: Tensor,
    job: _ChunkDivergence,
    *,
    lm_weight: float,
    want_gradient: bool,
) -> None:
    """Any divergence: with a = dD / dlog q, the gradient with respect to the student's logits over T is a - q sum(a).

    Arguments as above. With TP, two collectives a block: one for the masses, one for the sum of a.
    """
    q = WORKSPACE.take("student probabilities", (s.shape[0], s.shape[1]), s.dtype, s.device)
    torch.sum(torch.exp(s, out=q), -1, out=values[Value.STUDENT_MASS])
    to_log_p, to_log_q = log_share(*_peaks_and_masses(values, job), job.layer.tp).unsqueeze(-1)
    for logp, probability, to_logp in ((s, q, to_log_q), (t, p, to_log_p)):
        logp.add_(to_logp)
        probability.mul_(to_logp.exp())
    values[Value.TERMS] = divergence_terms(s, t, p, q, job.divergence)  # leaves a in s
    if want_gradient:
        weight = job.kd_weight * job.divergence.temperature
        total = sum_over(s.sum(-1), job.layer.tp)
        s.mul_(weight).addcmul_(q, (lm_weight - weight * total).unsqueeze(1))


def _peaks_and_masses(values: Tensor, job: _ChunkDivergence) -> tuple[Tensor, Tensor]:
    """Of teacher and student, `[2, rows]` each, over T."""
    peaks = values[: Value.STUDENT_PEAK + 1 : 2] / job.divergence.temperature
    return peaks, values[Value.TEACHER_MASS : Value.STUDENT_MASS + 1 : 2]


def _peaks(s: Tensor, t: Tensor, values: Tensor, *, statistics: bool) -> None:
    row_max(s, values[Value.STUDENT_PEAK])
    if statistics and t.shape[1]:
        top = t.max(-1)
        values[Value.TEACHER_PEAK] = top.values
        values[Value.STUDENT_AT_TOP] = s.gather(1, top.indices.unsqueeze(1)).squeeze(1)
    else:
        row_max(t, values[Value.TEACHER_PEAK])


def _token_sums(values_RKN: Tensor, job: _ChunkDivergence) -> Tensor:
    """Loss, divergence, agreement, both cross-entropies over the complete vocabulary, summed over a chunk's tokens."""
    v = dict(zip(Value, values_RKN.unbind(1), strict=True))
    t_peak, s_peak = v[Value.TEACHER_PEAK], v[Value.STUDENT_PEAK]
    scale = 1 / job.divergence.temperature
    t_log_z = torch.logsumexp(t_peak * scale + v[Value.TEACHER_MASS].log(), 0)
    s_log_z = torch.logsumexp(s_peak * scale + v[Value.STUDENT_MASS].log(), 0)
    if job.divergence.kind is DivergenceKind.FORWARD_KL:
        # Sum of p (t - s): each rank's part was taken with its own two peaks subtracted.
        parts = v[Value.TERMS] + (t_peak - s_peak) * scale * v[Value.TEACHER_MASS]
        kd = ((t_peak * scale - t_log_z).exp() * parts).sum(0) - t_log_z + s_log_z
    else:
        kd = v[Value.TERMS].sum(0)
    kd_sum = kd.sum() * job.divergence.temperature**2
    agreement = student_ce = teacher_ce = kd_sum.new_zeros(())
    if job.statistics:
        best_rank = t_peak.max(0).indices.unsqueeze(0)  # the first among equals holds the lowest token ids
        agreement = (v[Value.STUDENT_AT_TOP].gather(0, best_rank).squeeze(0) == s_peak.amax(0)).sum().double()
    if job.labels is not None:
        if job.divergence.temperature != 1:
            t_log_z = torch.logsumexp(t_peak + v[Value.TEACHER_MASS_1].log(), 0)
            s_log_z = torch.logsumexp(s_peak + v[Value.STUDENT_MASS_1].log(), 0)
        student_ce = labelled(s_log_z - v[Value.STUDENT_LABEL].sum(0), v[Value.LABEL_FOUND]).sum()
        teacher_ce = labelled(t_log_z - v[Value.TEACHER_LABEL].sum(0), v[Value.LABEL_FOUND]).sum()
    loss_sum = job.kd_weight * kd_sum + job.lm_weight * student_ce
    return torch.stack([loss_sum, kd_sum, agreement, student_ce, teacher_ce])
