"""Divergences between two distributions over the vocabulary, per token, in nats.

Inputs are log-probabilities whose last dimension is the complete vocabulary; -inf marks an impossible token. Nothing is
reduced or masked here. Shapes: `...V` in, `...` out. These are the dense forms: training on the full vocabulary never
builds their inputs, see `nemo_minitron.parallel.fused_linear_kd`. Each is a sum over tokens of the vocabulary, so on a
shard of it they give that shard's part.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.config.objective import DivergenceKind


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(teacher || student) of every token: mode-covering.

    0 exactly where the two agree; +inf where the student excludes a token that the teacher allows. Gradient with
    respect to both. Source: Hinton et al., arXiv:1503.02531; Muralidharan et al., arXiv:2407.14679, eq. (7).
    """
    teacher_p = teacher_logp.exp()
    possible = teacher_p > 0
    # The difference is masked before the product: 0 * (-inf + inf) would be NaN, in the gradient too.
    log_ratio = torch.where(possible, teacher_logp, 0) - torch.where(possible, student_logp, 0)
    return (teacher_p * log_ratio).sum(-1)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher) of every token: the student is asked not to leave what the teacher does."""
    return forward_kl(teacher_logp, student_logp)


def jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, *, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, `beta KL(teacher || m) + (1 - beta) KL(student || m)`.

    `m = beta * teacher + (1 - beta) * student`, 0 < beta < 1. Symmetric and at most log 2 for beta = 1/2. Divided by
    beta it tends to the forward KL as beta goes to 0, and divided by 1 - beta to the reverse KL as beta goes to 1.
    Source: Agarwal et al., arXiv:2306.13649, eq. (1).
    """
    middle = _mixture(student_logp, teacher_logp, beta)
    return beta * forward_kl(middle, teacher_logp) + (1 - beta) * forward_kl(middle, student_logp)


def skewed_kl(student_logp: Tensor, teacher_logp: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(teacher || skew * teacher + (1 - skew) * student), 0 < skew < 1; at most log(1 / skew).

    The forward KL with a bounded gradient where the student has nearly no probability. Source: Ko et al.,
    arXiv:2402.03898, section 3.1.
    """
    return forward_kl(_mixture(student_logp, teacher_logp, skew), teacher_logp)


def skewed_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(student || (1 - skew) * teacher + skew * student), 0 < skew < 1; at most log(1 / skew).

    Source: Ko et al., arXiv:2402.03898, section 3.1.
    """
    return forward_kl(_mixture(student_logp, teacher_logp, 1 - skew), student_logp)


def total_variation(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Half the sum of |teacher - student|: between 0 and 1, and no logarithm."""
    return (teacher_logp.exp() - student_logp.exp()).abs().sum(-1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Which divergence, and its parameters.

    Attributes:
        kind: What is measured.
        temperature: Divides both models' logits; its square multiplies the divergence, so that the gradient keeps its
            size as the temperature rises (arXiv:1503.02531, section 2.1).
        beta: Of the Jensen-Shannon divergence.
        skew: Of the two skewed divergences.
    """

    kind: DivergenceKind = DivergenceKind.FORWARD_KL
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", DivergenceKind(self.kind))  # configuration files hold its name
        if not self.temperature > 0 or not 0 < self.beta < 1 or not 0 < self.skew < 1:
            raise ValueError(f"temperature must be above 0, beta and skew between 0 and 1: {self}")

    def per_token(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """The divergence times the temperature's square, from log-probabilities at that temperature."""
        match self.kind:
            case DivergenceKind.FORWARD_KL:
                value = forward_kl(student_logp, teacher_logp)
            case DivergenceKind.REVERSE_KL:
                value = reverse_kl(student_logp, teacher_logp)
            case DivergenceKind.JENSEN_SHANNON:
                value = jensen_shannon(student_logp, teacher_logp, beta=self.beta)
            case DivergenceKind.SKEWED_KL:
                value = skewed_kl(student_logp, teacher_logp, skew=self.skew)
            case DivergenceKind.SKEWED_REVERSE_KL:
                value = skewed_reverse_kl(student_logp, teacher_logp, skew=self.skew)
            case DivergenceKind.TOTAL_VARIATION:
                value = total_variation(student_logp, teacher_logp)
        return value * self.temperature**2


def _mixture(student_logp: Tensor, teacher_logp: Tensor, teacher_weight: float) -> Tensor:
    """log(w * teacher + (1 - w) * student)."""
    # A token that both exclude is left out of the mixture: the gradient of logaddexp(-inf, -inf) is NaN.
    possible = (teacher_logp > -math.inf) | (student_logp > -math.inf)
    teacher, student = torch.where(possible, teacher_logp, 0), torch.where(possible, student_logp, 0)
    mixture = torch.logaddexp(teacher + math.log(teacher_weight), student + math.log1p(-teacher_weight))
    return torch.where(possible, mixture, -math.inf)
