"""Triton kernels of the divergences between teacher and student on a chunk of logits, in two or three passes.

1. `divergence_statistics` reads both logits once and leaves, for each token, what the loss and the statistics need of
   this shard of the vocabulary. The forward and the reverse KL are complete after it.
2. `divergence_terms` reads both once more for the other divergences, whose terms need probabilities over the complete
   vocabulary and cannot be rescaled afterwards.
3. `divergence_gradient` reads both and overwrites the student's logits with their gradient.

Between them stand collectives, if the vocabulary is split; see `nemo_minitron.parallel.kernel_forms`. Formulas are
those of `nemo_minitron.parallel.divergence_terms` with p the teacher's and q the student's probabilities. Each call is
one launch, and an operator of torch, so that tensors without data (fake, meta) pass through.

Shapes: N tokens, V real columns of this rank's shard. Logits `[N, V]` may have any row stride and float dtype; all
else is float32. Labels are global token ids `[N]` int64, or `[0]` for none; `first` is the id of the shard's first
token. Logits are divided by `temperature`; `kind` names the divergence, and `mixing` is its beta or skew.
`normalisers` `[5, N]` are the peak over the complete vocabulary and the log of the mass above it of the teacher, then
of the student, at the temperature, and the log of the student's mass at temperature 1.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# Triton has no types for what a kernel is written in.

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_minitron.kernels.launch import BLOCK, EMPTY, WARPS, on_device_of

_LEAST = tl.constexpr(1.2e-38)  # the smallest normal number: a smaller constant would be float64
_EMPTY = tl.constexpr(EMPTY)


@torch.library.custom_op("nemo_minitron::divergence_statistics", mutates_args=("values",))
def divergence_statistics(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    values: Tensor,
    first: int,
    temperature: float,
    kind: str,
    top: bool,
) -> None:
    """Fill `values` `[11, N]`, whose rows are those of `nemo_minitron.parallel.token_values.Value`.

    Terms are summed for `forward_kl` and `reverse_kl`; without labels, their rows and those of temperature 1 are 0.
    `top` says whether to look up the student's logit at the teacher's largest.
    """
    tokens, columns = student.shape
    with on_device_of(student):
        _statistics[(tokens,)](
            student,
            teacher,
            labels,
            values,
            first,
            columns,
            student.stride(0),
            teacher.stride(0),
            tokens,
            1 / temperature,
            KIND=kind,
            TOP=top,
            LABELS=labels.numel() > 0,
            TEMPERED=temperature != 1,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@torch.library.custom_op("nemo_minitron::divergence_terms", mutates_args=("sums",))
def divergence_terms(
    student: Tensor, teacher: Tensor, normalisers: Tensor, sums: Tensor, temperature: float, kind: str, mixing: float
) -> None:
    """Fill `sums` `[2, N]`: the shard's part of the divergence (without T^2), and of the sum of a = dD / dlog q.

    Not for the forward KL. The student's mass at temperature 1 is not read.
    """
    tokens, columns = student.shape
    with on_device_of(student):
        _terms[(tokens,)](
            student,
            teacher,
            normalisers,
            sums,
            columns,
            student.stride(0),
            teacher.stride(0),
            tokens,
            1 / temperature,
            mixing,
            KIND=kind,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@torch.library.custom_op("nemo_minitron::divergence_gradient", mutates_args=("student",))
def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    normalisers: Tensor,
    slope_sum: Tensor,
    labels: Tensor,
    first: int,
    temperature: float,
    kind: str,
    mixing: float,
    kd_weight: float,
    lm_weight: float,
) -> None:
    """Overwrite the student's logits with the gradient of `kd_weight * T^2 * D + lm_weight * CE`.

    `slope_sum` `[N]` is the sum of a over the complete vocabulary, not read for the forward KL; `lm_weight`, the factor
    of the cross-entropy at temperature 1, needs labels above 0.
    """
    tokens, columns = student.shape
    if not columns:
        return
    with on_device_of(student):
        _gradient[(tokens, triton.cdiv(columns, BLOCK))](
            student,
            teacher,
            normalisers,
            slope_sum,
            labels,
            first,
            columns,
            student.stride(0),
            teacher.stride(0),
            tokens,
            1 / temperature,
            mixing,
            kd_weight * temperature,
            lm_weight,
            KIND=kind,
            LABELS=lm_weight != 0,
            TEMPERED=temperature != 1,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@triton.jit
def _statistics(
    student,
    teacher,
    labels,
    values,
    first,
    columns,
    student_stride,
    teacher_stride,
    tokens,
    scale,
    KIND: tl.constexpr,
    TOP: tl.constexpr,
    LABELS: tl.constexpr,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    values += row
    lanes = tl.arange(0, BLOCK)
    s_peak = tl.full((), _EMPTY, tl.float32)
    t_peak = tl.full((), _EMPTY, tl.float32)
    top = tl.full((), 0, tl.int32)
    s_mass = tl.zeros((BLOCK,), tl.float32)
    t_mass = tl.zeros((BLOCK,), tl.float32)
    terms = tl.zeros((BLOCK,), tl.float32)
    s_mass_1 = tl.zeros((BLOCK,), tl.float32)
    t_mass_1 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        s = _loaded(student, start + lanes, columns)
        t = _loaded(teacher, start + lanes, columns)
        if TOP:
            best, place = tl.max(t, 0, return_indices=True)
            top = tl.where(best > t_peak, start + place, top)
        else:
            best = tl.max(t, 0)
        s_new = tl.maximum(s_peak, tl.max(s, 0))
        t_new = tl.maximum(t_peak, best)
        # What was summed so far is taken over to the new peaks; both shifts are at most 0.
        s_shift = tl.maximum((s_peak - s_new) * scale, _EMPTY)
        t_shift = tl.maximum((t_peak - t_new) * scale, _EMPTY)
        s_above = (s - s_new) * scale
        t_above = (t - t_new) * scale
        s_weight = tl.exp(s_above)
        t_weight = tl.exp(t_above)
        if KIND == "forward_kl":
            terms = (terms + (t_shift - s_shift) * t_mass) * tl.exp(t_shift)
            terms += tl.where(inside, t_weight * (t_above - s_above), 0)
        if KIND == "reverse_kl":
            terms = (terms + (s_shift - t_shift) * s_mass) * tl.exp(s_shift)
            terms += tl.where(inside, s_weight * (s_above - t_above), 0)
        s_mass = s_mass * tl.exp(s_shift) + s_weight
        t_mass = t_mass * tl.exp(t_shift) + t_weight
        if LABELS and TEMPERED:
            s_mass_1 = s_mass_1 * tl.exp(s_peak - s_new) + tl.exp(s - s_new)
            t_mass_1 = t_mass_1 * tl.exp(t_peak - t_new) + tl.exp(t - t_new)
        s_peak = s_new
        t_peak = t_new
    _store_sums(values, tokens, t_peak, t_mass, s_peak, s_mass, terms, t_mass_1, s_mass_1)
    _store_lookups(student, teacher, labels + row, values, first, columns, tokens, top, TOP, LABELS)


@triton.jit
def _loaded(logits, column, columns):
    """Logits at some columns in float32; beyond the last one, what changes no maximum and no mass."""
    inside = column < columns
    return tl.where(inside, tl.load(logits + column, mask=inside, other=0).to(tl.float32), _EMPTY)


@triton.jit
def _store_sums(values, tokens, t_peak, t_mass, s_peak, s_mass, terms, t_mass_1, s_mass_1):
    tl.store(values, t_peak)
    tl.store(values + 1 * tokens, tl.sum(t_mass, 0))
    tl.store(values + 2 * tokens, s_peak)
    tl.store(values + 3 * tokens, tl.sum(s_mass, 0))
    tl.store(values + 4 * tokens, tl.sum(terms, 0))
    tl.store(values + 9 * tokens, tl.sum(t_mass_1, 0))
    tl.store(values + 10 * tokens, tl.sum(s_mass_1, 0))


@triton.jit
def _store_lookups(
    student, teacher, label, values, first, columns, tokens, top, TOP: tl.constexpr, LABELS: tl.constexpr
):
    """The student's logit at the teacher's largest, both logits of the label, and whether it is in this shard."""
    at_top = 0.0
    if TOP:
        at_top = tl.load(student + top, mask=top < columns, other=0).to(tl.float32)
    tl.store(values + 5 * tokens, at_top)
    of_teacher = 0.0
    of_student = 0.0
    found = 0.0
    if LABELS:
        column = tl.load(label) - first
        mine = (column >= 0) & (column < columns)
        of_teacher = tl.load(teacher + column, mask=mine, other=0).to(tl.float32)
        of_student = tl.load(student + column, mask=mine, other=0).to(tl.float32)
        found = mine.to(tl.float32)
    tl.store(values + 6 * tokens, of_teacher)
    tl.store(values + 7 * tokens, of_student)
    tl.store(values + 8 * tokens, found)


@triton.jit
def _log_mixture(p, q, p_weight):
    return tl.log(tl.maximum(p_weight * p + (1 - p_weight) * q, _LEAST))


@triton.jit
def _slope(log_p, log_q, p, q, mixing, KIND: tl.constexpr):
    """Of D in log q, up to a multiple of q."""
    if KIND == "forward_kl":
        slope = -p
    elif KIND == "reverse_kl":
        slope = q * (log_q - log_p)
    elif KIND == "total_variation":
        slope = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    elif KIND == "jensen_shannon":
        slope = (1 - mixing) * q * (log_q - _log_mixture(p, q, mixing))
    elif KIND == "skewed_kl":
        slope = (mixing - 1) * q * tl.exp(log_p - _log_mixture(p, q, mixing))
    else:
        tl.static_assert(KIND == "skewed_reverse_kl")
        ratio = log_q - _log_mixture(p, q, 1 - mixing)
        slope = q * (ratio - mixing * tl.exp(ratio))
    return slope


@triton.jit
def _value(log_p, log_q, p, q, mixing, KIND: tl.constexpr):
    """The terms of D."""
    if KIND == "reverse_kl":
        value = q * (log_q - log_p)
    elif KIND == "total_variation":
        value = tl.abs(q - p) * 0.5
    elif KIND == "jensen_shannon":
        log_m = _log_mixture(p, q, mixing)
        value = mixing * p * (log_p - log_m) + (1 - mixing) * q * (log_q - log_m)
    elif KIND == "skewed_kl":
        value = p * (log_p - _log_mixture(p, q, mixing))
    else:
        tl.static_assert(KIND == "skewed_reverse_kl")
        value = q * (log_q - _log_mixture(p, q, 1 - mixing))
    return value


@triton.jit
def _terms(
    student,
    teacher,
    normalisers,
    sums,
    columns,
    student_stride,
    teacher_stride,
    tokens,
    scale,
    mixing,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    t_peak = tl.load(normalisers + row)
    t_log_mass = tl.load(normalisers + tokens + row)
    s_peak = tl.load(normalisers + 2 * tokens + row)
    s_log_mass = tl.load(normalisers + 3 * tokens + row)
    lanes = tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    slope = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        s = tl.load(student + start + lanes, mask=inside, other=0).to(tl.float32)
        t = tl.load(teacher + start + lanes, mask=inside, other=0).to(tl.float32)
        log_q = (s - s_peak) * scale - s_log_mass
        log_p = (t - t_peak) * scale - t_log_mass
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        value += tl.where(inside, _value(log_p, log_q, p, q, mixing, KIND), 0)
        slope += tl.where(inside, _slope(log_p, log_q, p, q, mixing, KIND), 0)
    tl.store(sums + row, tl.sum(value, 0))
    tl.store(sums + tokens + row, tl.sum(slope, 0))


@triton.jit
def _gradient(
    student,
    teacher,
    normalisers,
    slope_sum,
    labels,
    first,
    columns,
    student_stride,
    teacher_stride,
    tokens,
    scale,
    mixing,
    kd_weight,
    lm_weight,
    KIND: tl.constexpr,
    LABELS: tl.constexpr,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    student += row * student_stride
    s = tl.load(student + column, mask=inside, other=0).to(tl.float32)
    t = tl.load(teacher + row * teacher_stride + column, mask=inside, other=0).to(tl.float32)
    s_peak = tl.load(normalisers + 2 * tokens + row)
    log_p = (t - tl.load(normalisers + row)) * scale - tl.load(normalisers + tokens + row)
    log_q = (s - s_peak) * scale - tl.load(normalisers + 3 * tokens + row)
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == "forward_kl":
        gradient = kd_weight * (q - p)
    else:
        gradient = kd_weight * (_slope(log_p, log_q, p, q, mixing, KIND) - q * tl.load(slope_sum + row))
    if LABELS:
        if TEMPERED:
            q = tl.exp(s - s_peak - tl.load(normalisers + 4 * tokens + row))
        label = tl.load(labels + row) - first
        gradient += lm_weight * (q - tl.where(column == label, 1.0, 0.0))
    tl.store(student + column, gradient.to(student.dtype.element_ty), mask=inside)
