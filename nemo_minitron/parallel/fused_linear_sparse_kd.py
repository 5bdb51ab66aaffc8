"""Distillation from a few entries of the teacher's distribution, with the student's output layer inside; no teacher.

    KD = T^2 * sum over kept tokens of D(target, student), over the buckets {each entry's id} and {all other ids}

Top-k targets give the likeliest ids and the probability of all others; sampled targets give shares of random draws,
nothing in the last bucket, and the gradient of the full forward KL on average (see `nemo_minitron.ops.sampling`). With
a = dD / dlog(student's bucket), A its sum, q the student's probabilities and Q the one of the last bucket, the gradient
with respect to the student's logits over T is `a - q A` at an entry's id and `q (a_last / Q - A)` elsewhere.

Value and `a` come from the dense formulas on `[rows, K + 1]` numbers, the rest from one pass over a chunk of logits. On
a GPU two Triton kernels make it (`nemo_minitron.kernels.rest`).

Shapes: N tokens, K entries per token, h hidden size, V this rank's shard of the (padded) vocabulary, R ranks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.kernels.available import kernels_run
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.collectives import gather, sum_over
from nemo_minitron.parallel.fused_linear import (
    EMPTY,
    OutputLayer,
    label_columns,
    label_logits,
    labelled,
    row_max,
    wide_dtype,
    widened,
)
from nemo_minitron.parallel.fused_linear_kd import FusedLoss


def fused_linear_sparse_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    targets: SparseTargets,
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
    """The distillation loss of a micro-batch from stored or freshly made targets.

    Gradients, precision, masking and the arguments are those of `fused_linear_kd`. `kd_sum` of sampled targets is the
    divergence from the shares of the draws; it exceeds that from the full distribution by what the draws miss of the
    teacher's entropy. `top1_agreement` takes the target's heaviest entry for the teacher's best token, and
    `teacher_ce_sum` is None: a label need not be among the entries.

    `targets` are of all N tokens, masked ones included (their contents do not matter). `divergence` None is the forward
    KL, the only one for sampled targets; its temperature must be the targets'.

    Raises:
        ValueError: The divergence does not fit the targets.
    """
    if lm_weight and labels is None:
        raise ValueError("lm_weight above 0 needs labels")
    divergence = divergence or Divergence(temperature=targets.temperature)
    if targets.sampled and divergence.kind is not DivergenceKind.FORWARD_KL:
        raise ValueError(f"sampled targets are unbiased for the forward KL alone, not for {divergence.kind}")
    if divergence.temperature != targets.temperature:
        raise ValueError(f"targets were taken at temperature {targets.temperature}, not {divergence.temperature}")
    layer = OutputLayer.of(student_hidden, student_weight, keep, vocab_size, chunk_tokens, tp, weight_gradient)
    job = _ChunkSparse(
        targets=targets if layer.tokens.kept is None else targets.select(layer.tokens.kept),
        labels=layer.tokens.of(labels) if labels is not None and (statistics or lm_weight) else None,
        divergence=divergence,
        kd_weight=kd_weight,
        lm_weight=lm_weight,
        layer=layer,
    )
    loss_sum, kd_sum, agreement, student_ce = layer.apply(student_hidden, student_weight, job)
    result = FusedLoss(loss_sum, kd_sum, layer.tokens.count)
    if statistics:
        result = replace(result, top1_agreement=agreement, student_ce_sum=None if labels is None else student_ce)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entries:
    """The targets of a block of tokens, and the student's logits at their ids, which every rank knows."""

    local: Tensor
    """`[rows, K]`: columns in this rank's shard, 0 where the id is another's."""
    mine: Tensor
    logits: Tensor
    """`[rows, K]`, -inf where an entry is not used."""
    target_logp: Tensor
    """`[rows, K + 1]`"""

    def rows(self, block: slice) -> "_Entries":
        return _Entries(
            local=self.local[block],
            mine=self.mine[block],
            logits=self.logits[block],
            target_logp=self.target_logp[block],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChunkSparse:
    targets: SparseTargets
    labels: Tensor | None
    divergence: Divergence
    kd_weight: float
    lm_weight: float
    layer: OutputLayer
    logits_held: int = 1
    scratch_held: int = 3
    sums: int = 4

    def __call__(self, logits: Tensor, chunk: slice, *, want_gradient: bool) -> Tensor:
        layer, wide = self.layer, wide_dtype(logits.dtype)
        targets = self.targets.select(chunk)
        local, mine = label_columns(targets.ids.long(), columns=layer.columns, real=layer.real, tp=layer.tp)
        picked = sum_over(label_logits(logits, local, mine), layer.tp)
        entries = _Entries(
            local=local,
            mine=mine,
            logits=torch.where(targets.ids >= 0, picked, -torch.inf),
            target_logp=targets.bucket_logp(wide),
        )
        log_z_1 = torch.zeros(logits.shape[0], dtype=torch.float64, device=logits.device)
        sums = torch.zeros(self.sums, dtype=torch.float64, device=logits.device)
        label = None
        if self.labels is not None:
            label = label_columns(self.labels[chunk], columns=layer.columns, real=layer.real, tp=layer.tp)
            at_label, found = sum_over(torch.stack([label_logits(logits, *label), label[1].to(wide)]), layer.tp)
        on_kernels = kernels_run(logits.device, logits.dtype)
        for block in [slice(None)] if on_kernels else layer.blocks(logits):
            work = _on_kernels if on_kernels else _block
            kd, agreement, log_z_1[block] = work(logits[block], entries.rows(block), self, want_gradient)
            sums[1] += kd.sum()
            sums[2] += agreement
        if label is not None:
            sums[3] = labelled(log_z_1 - at_label, found.unsqueeze(0)).sum()
            if want_gradient and self.lm_weight and layer.real:
                one_hot = label[1].unsqueeze(1).to(logits.dtype).mul_(-self.lm_weight)
                logits.scatter_add_(1, label[0].unsqueeze(1), one_hot)
        sums[0] = self.kd_weight * sums[1] + self.lm_weight * sums[3]
        return sums


def _block(logits: Tensor, entries: _Entries, job: _ChunkSparse, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of each token, how many agree on the best token, and log Z at temperature 1; logits to gradient."""
    temperature, tp = job.divergence.temperature, job.layer.tp
    s = widened("student block", logits)
    # The loss may need the student's softmax at temperature 1 beside the one at T.
    softmax_t1 = _softmax(s.clone(), tp) if temperature != 1 and job.labels is not None else None
    s.mul_(1 / temperature)
    if s.shape[1]:
        # Only what the entries leave over is summed: the total less the entries would lose a small tail to rounding.
        s.scatter_add_(1, entries.local, torch.where(entries.mine, -torch.inf, 0).to(s.dtype))
    peak = row_max(s, s.new_empty(s.shape[0])).clamp_min_(EMPTY)
    mass = s.sub_(peak.unsqueeze(1)).exp_().sum(1)
    peaks, masses = gather(torch.stack([peak, mass]).double(), tp).unbind(1)
    log_rest = torch.logsumexp(peaks + masses.log(), 0)
    at_entries = entries.logits.double() / temperature
    log_z = torch.logaddexp(log_rest, at_entries.logsumexp(1))
    student_logp = torch.cat([at_entries, log_rest.unsqueeze(1)], 1) - log_z.unsqueeze(1)
    kd, slope = _value_and_slope(student_logp, entries.target_logp.double(), job)
    heaviest = at_entries.gather(1, entries.target_logp[:, :-1].argmax(1, keepdim=True)).squeeze(1)
    best_of_rest = torch.where(masses > 0, peaks, -torch.inf).amax(0)
    agreement = (heaviest == torch.maximum(at_entries.amax(1), best_of_rest)).sum()
    if want_gradient:
        total = slope.sum(1) - (job.lm_weight if softmax_t1 is None else 0.0)
        # Of a column outside the entries: e^(s - peak) times what follows, with both exponents at most 0.
        into_tail = torch.where(slope[:, -1] == 0, 0, slope[:, -1] * (peak - log_rest).exp())
        s.mul_((into_tail - total * (peak - log_z).exp()).to(s.dtype).unsqueeze(1))
        if s.shape[1]:
            at_ids = slope[:, :-1] - student_logp[:, :-1].exp() * total.unsqueeze(1)
            s.scatter_add_(1, entries.local, torch.where(entries.mine, at_ids, 0).to(s.dtype))
        if softmax_t1 is not None and job.lm_weight:
            s.add_(softmax_t1[0], alpha=job.lm_weight)
        if s is not logits:
            logits.copy_(s)
    return kd, agreement, log_z if softmax_t1 is None else softmax_t1[1]


def _on_kernels(
    logits: Tensor, entries: _Entries, job: _ChunkSparse, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_block` returns, with two passes over the logits by Triton's kernels, in their own dtype."""
    from nemo_minitron.kernels.rest import rest_gradient, rest_statistics

    temperature, lm_weight = job.divergence.temperature, job.lm_weight
    softmax_t1 = temperature != 1 and job.labels is not None
    if logits.shape[1]:
        logits.scatter_add_(1, entries.local, torch.where(entries.mine, -torch.inf, 0).to(logits.dtype))
    values = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
    rest_statistics(logits, values, temperature)
    peaks, masses, masses_1 = gather(values.double(), job.layer.tp).unbind(1)
    log_rest = torch.logsumexp(peaks / temperature + masses.log(), 0)
    raw = entries.logits.double()
    at_entries = raw / temperature
    log_z = torch.logaddexp(log_rest, at_entries.logsumexp(1))
    log_z_1 = log_z
    if softmax_t1:
        log_z_1 = torch.logaddexp(torch.logsumexp(peaks + masses_1.log(), 0), raw.logsumexp(1))
    student_logp = torch.cat([at_entries, log_rest.unsqueeze(1)], 1) - log_z.unsqueeze(1)
    kd, slope = _value_and_slope(student_logp, entries.target_logp.double(), job)
    heaviest = raw.gather(1, entries.target_logp[:, :-1].argmax(1, keepdim=True)).squeeze(1)
    best_of_rest = torch.where(masses > 0, peaks, -torch.inf).amax(0)
    agreement = (heaviest == torch.maximum(raw.amax(1), best_of_rest)).sum()
    if want_gradient:
        peak = values[0].double()
        total = slope.sum(1) - (0.0 if softmax_t1 else lm_weight)
        into_tail = torch.where(slope[:, -1] == 0, 0, slope[:, -1] * (peak / temperature - log_rest).exp())
        factor = into_tail - total * (peak / temperature - log_z).exp()
        factor_1 = lm_weight * (peak - log_z_1).exp() if softmax_t1 else torch.zeros_like(peak)
        rest_gradient(logits, torch.stack([peak, factor, factor_1]).float(), temperature)
        at_ids = slope[:, :-1] - student_logp[:, :-1].exp() * total.unsqueeze(1)
        if softmax_t1:
            at_ids += lm_weight * (raw - log_z_1.unsqueeze(1)).exp()
        if logits.shape[1]:
            logits.scatter_add_(1, entries.local, torch.where(entries.mine, at_ids, 0).to(logits.dtype))
    return kd, agreement, log_z_1


def _softmax(s: Tensor, tp: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Probabilities in place, and log Z `[rows]` float64."""
    peak = row_max(s, s.new_empty(s.shape[0]))
    mass = s.sub_(peak.unsqueeze(1)).exp_().sum(1)
    peaks, masses = gather(torch.stack([peak, mass]).double(), tp).unbind(1)
    log_z = torch.logsumexp(peaks + masses.log(), 0)
    return s.mul_((peak - log_z).exp().to(s.dtype).unsqueeze(1)), log_z


def _value_and_slope(student_logp: Tensor, target_logp: Tensor, job: _ChunkSparse) -> tuple[Tensor, Tensor]:
    """The divergence `[rows]` with T^2, and `[rows, K + 1]` its slope in log q, for the gradient in the raw logits."""
    with torch.enable_grad():
        leaf = student_logp.detach().requires_grad_()
        kd = job.divergence.per_token(leaf, target_logp)
        (slope,) = torch.autograd.grad(kd.sum(), leaf)
    return kd.detach(), slope * (job.kd_weight / job.divergence.temperature)
