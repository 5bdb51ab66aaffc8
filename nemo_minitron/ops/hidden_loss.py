"""Losses between intermediate states of student and teacher, through a projection that both sides of a pair share.

Sums over kept tokens, never means, so that micro-batches, data-parallel ranks and parts of a sequence
(context or sequence parallelism) add up; states must hold all their channels. Source: Muralidharan et al.,
arXiv:2407.14679, section 3 and table 17.

Shapes: h channels of the student, H of the teacher; `...` are tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional

from nemo_minitron.config.objective import HiddenLossKind


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(student, teacher) of every token: 0 where they point the same way, at most 2. `...H` in, `...` out.

    A state of zeros counts as perpendicular to all others.
    """
    return 1 - functional.cosine_similarity(_wide(student), _wide(teacher), dim=-1)


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over channels of the squared difference, of every token. `...H` in, `...` out."""
    return (_wide(student) - _wide(teacher)).square().mean(-1)


def hidden_loss(
    student: Tensor, teacher: Tensor, keep: Tensor, projection: Tensor | None = None, *, kind: HiddenLossKind
) -> Tensor:
    """Sum over kept tokens of the loss between one pair of states, with gradients for student and projection.

    The projection is applied in its operands' dtype, everything after it in float32 (float64 for float64).

    Args:
        student: `[..., h]` states after a norm.
        teacher: `[..., H]`; no gradient.
        keep: `[...]`, tokens that count. The others are not computed, and may hold NaN. None at all gives 0 with a
            graph. It may lie on the host while the states are on a GPU, which is then not waited for.
        projection: `[H, h]`, learned, one for all pairs of layers; None compares as is, which needs h = H.
        kind: Which loss.
    """
    kept = keep.flatten().nonzero().flatten().to(student.device, non_blocking=True)
    student, teacher = (x.flatten(0, -2).index_select(0, kept) for x in (student, teacher.detach()))
    if projection is not None:
        student = functional.linear(student, projection)
    per_token = cosine_distance if kind is HiddenLossKind.COSINE else mean_squared_error
    return per_token(student, teacher).sum()


def dynamic_weight(kd: Tensor, hidden: Tensor) -> Tensor:
    """The factor that makes the hidden loss as large as the divergence, `kd / hidden`, without gradient.

    Both of the same tokens, as sums or as means. 0 where the hidden loss is 0, which leaves nothing to balance.
    Source: arXiv:2407.14679, section 3: the weight is taken anew in every step, which did better than a constant.
    """
    kd, hidden = kd.detach(), hidden.detach()
    return torch.where(hidden > 0, kd / torch.where(hidden > 0, hidden, 1), 0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
