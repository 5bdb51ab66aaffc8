"""Divergences between two distributions over the vocabulary, per token, in nats.

Inputs are log-probabilities whose last dimension is the whole vocabulary; -inf marks an impossible token. Nothing is
reduced or masked here. Shapes: `...V` in, `...` out. These are the dense forms: the full-vocabulary forward KL of
training never builds its inputs, see `nemo_minitron.parallel.fused_linear_kl`.
"""

import math

import torch
from torch import Tensor


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(teacher || student) of every token: the student is asked to cover all that the teacher does.

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
    # A token that both exclude is left out of the mixture: the gradient of logaddexp(-inf, -inf) is NaN.
    possible = (teacher_logp > -math.inf) | (student_logp > -math.inf)
    teacher, student = torch.where(possible, teacher_logp, 0), torch.where(possible, student_logp, 0)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    mixture = torch.where(possible, mixture, -math.inf)
    return beta * forward_kl(mixture, teacher_logp) + (1 - beta) * forward_kl(mixture, student_logp)
