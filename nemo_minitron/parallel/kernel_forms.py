"""The Triton forms of the fused losses on one chunk: kernels on this rank's shard, and the collectives between them.

One collective a chunk for the cross-entropy, the forward and the reverse KL, two for the other divergences: the masses
have to be known over the complete vocabulary before their terms can be formed.

Shapes: N tokens of the chunk, V real columns of this rank's shard, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.parallel.collectives import gather
from nemo_minitron.parallel.token_values import Value

_WITHIN_ONE_PASS = {DivergenceKind.FORWARD_KL, DivergenceKind.REVERSE_KL}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelDivergence:
    """Which loss the kernels compute: `kd_weight * T^2 D + lm_weight * CE`, and top-1 agreement if `top` is wanted."""

    divergence: Divergence
    kd_weight: float
    lm_weight: float
    top: bool
    first: int
    tp: ProcessGroup | None

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None, *, want_gradient: bool) -> Tensor:
        """What `Value` says of each token, of every rank: `[R, 11, N]` float32.

        The student's logits are overwritten with their gradient if that is wanted. Labels `[N]` are global token ids.
        """
        from nemo_minitron.kernels.divergence import divergence_gradient, divergence_statistics, divergence_terms

        kind, temperature = self.divergence.kind, self.divergence.temperature
        mixing = self.divergence.beta if kind is DivergenceKind.JENSEN_SHANNON else self.divergence.skew
        ids = student.new_empty(0, dtype=torch.int64) if labels is None else labels
        values = student.new_empty(len(Value), student.shape[0], dtype=torch.float32)
        divergence_statistics(student, teacher, ids, values, self.first, temperature, kind.value, self.top)
        gathered = gather(values, self.tp)
        normalisers = _normalisers(gathered, temperature)
        slope_sum = normalisers[0]  # not read for the forward KL
        if kind is DivergenceKind.REVERSE_KL:
            # a = q (log q - log p): its sum is the divergence.
            parts = gathered[:, Value.TERMS] = _reverse_kl(gathered, normalisers, temperature)
            slope_sum = parts.sum(0)
        elif kind not in _WITHIN_ONE_PASS:
            sums = values.new_empty(2, student.shape[0])
            divergence_terms(student, teacher, normalisers, sums, temperature, kind.value, mixing)
            terms, slopes = gather(sums, self.tp).unbind(1)
            gathered[:, Value.TERMS] = terms
            slope_sum = slopes.sum(0)
        if want_gradient:
            divergence_gradient(
                student,
                teacher,
                normalisers,
                slope_sum,
                ids,
                self.first,
                temperature,
                kind.value,
                mixing,
                self.kd_weight,
                self.lm_weight,
            )
        return gathered


def kernel_cross_entropy(
    logits: Tensor, labels: Tensor, *, first: int, tp: ProcessGroup | None, want_gradient: bool
) -> Tensor:
    """Peak, mass above it, the label's logit and whether it is here, of each token and rank: `[R, 4, N]` float32.

    `logits` `[N, V]` are overwritten with the gradient of the sum over tokens, if that is wanted; `labels` `[N]` are
    global token ids, and `first` is that of the shard's first token.
    """
    from nemo_minitron.kernels.cross_entropy import cross_entropy_gradient, cross_entropy_statistics

    values = logits.new_empty(4, logits.shape[0], dtype=torch.float32)
    cross_entropy_statistics(logits, labels, values, first)
    gathered = gather(values, tp)
    if want_gradient:
        normalisers = torch.stack(_peak_and_log_mass(gathered[:, 0], gathered[:, 1], 1.0))
        cross_entropy_gradient(logits, normalisers, labels, first)
    return gathered


def _normalisers(values_RKN: Tensor, temperature: float) -> Tensor:
    """`[5, N]`: peak and log mass of the teacher, of the student, and the student's log mass at temperature 1."""
    peaks, masses = values_RKN[:, : Value.STUDENT_PEAK + 1 : 2], values_RKN[:, Value.TEACHER_MASS : Value.TERMS : 2]
    peak, log_mass = _peak_and_log_mass(peaks, masses, temperature)
    _, log_mass_1 = _peak_and_log_mass(values_RKN[:, Value.STUDENT_PEAK], values_RKN[:, Value.STUDENT_MASS_1], 1.0)
    return torch.stack([peak[0], log_mass[0], peak[1], log_mass[1], log_mass_1])


def _peak_and_log_mass(peaks_R: Tensor, masses_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Over all ranks: the largest peak, and the logarithm of `sum exp((x - peak) / T)`; any shape behind the ranks."""
    if len(peaks_R) == 1:
        return peaks_R[0], masses_R[0].log()
    peak = peaks_R.amax(0)
    return peak, (masses_R * ((peaks_R - peak) / temperature).exp()).sum(0).log()


def _reverse_kl(values_RKN: Tensor, normalisers: Tensor, temperature: float) -> Tensor:
    """Each rank's part of KL(q || p), `[R, N]`, from its sum of exp(s) (s - t) over its own peaks."""
    v = values_RKN.double()
    t_peak, t_log_mass, s_peak, s_log_mass, _ = normalisers.double()
    to_log_p = (v[:, Value.TEACHER_PEAK] - t_peak) / temperature - t_log_mass
    to_log_q = (v[:, Value.STUDENT_PEAK] - s_peak) / temperature - s_log_mass
    parts = v[:, Value.TERMS] + (to_log_q - to_log_p) * v[:, Value.STUDENT_MASS]
    share: Tensor = to_log_q.exp() * parts
    return share.to(values_RKN.dtype)
