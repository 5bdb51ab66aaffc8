"""What a router makes of its logits: which experts see a token, and with what weight.

Shapes: T tokens, E experts; of sequences S positions, B samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron.ops.widening import at_least_fp32

_TINY = 1e-20
"""Added to the sum of sigmoid scores before it divides them, as in DeepSeek-V3's code."""


class Routes(NamedTuple):
    """Where a router sends each token."""

    weights: Tensor
    """Of every expert, `[T, E]`, at least fp32; zero for those that the token is not routed to."""
    chosen: Tensor
    """Which experts the token is routed to, `[T, E]` bool: `top_k` of them, also where a weight is rounded to zero."""


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    sigmoid: bool = False,
    normalize: bool = True,
    bias_E: Tensor | None = None,
    scaling: float = 1.0,
) -> Routes:
    """Which experts see a token, and with what weight.

    Scores are softmax or sigmoid of the logits. The `top_k` experts of the highest scores are chosen; with a bias, of
    the highest scores plus bias, and their weights are scores without it (arXiv:2412.19437, eq. 16). No token is
    dropped.

    Args:
        logits_TE: Of the router.
        top_k: Experts of a token.
        sigmoid: Whether scores are sigmoids.
        normalize: Whether the chosen scores are divided by their sum.
        bias_E: Has a say in the choice alone.
        scaling: Factor of the weights.
    """
    wide = at_least_fp32(logits_TE)
    scores_TE = wide.sigmoid() if sigmoid else wide.softmax(-1)
    order_TE = scores_TE if bias_E is None else scores_TE + bias_E
    chosen_TK = order_TE.detach().topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, chosen_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + (_TINY if sigmoid else 0.0))
    return Routes(
        weights=torch.zeros_like(scores_TE).scatter(1, chosen_TK, weights_TK * scaling),
        chosen=torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, chosen_TK, value=True),
    )


def router_divergence(teacher_TE: Tensor, student_TE: Tensor, keep_T: Tensor, *, sigmoid: bool = False) -> Tensor:
    """KL(teacher || student) between the distributions of two routers over the same experts, nats, summed over tokens.

    A distribution is the scores of all experts divided by their sum.

    Args:
        teacher_TE: Logits, without a graph.
        student_TE: Logits.
        keep_T: Which tokens count.
        sigmoid: Whether scores are sigmoids.
    """
    p_TE, q_TE = (_log_distribution(each, sigmoid=sigmoid) for each in (teacher_TE, student_TE))
    per_token_T = (p_TE.exp() * (p_TE - q_TE)).sum(-1)
    return torch.where(keep_T, per_token_T, 0).sum()


def load_imbalance(logits_SBE: Tensor, keep_SB: Tensor, *, top_k: int, sigmoid: bool = False) -> Tensor:
    """The load-balancing loss of each sequence, times its tokens, summed over sequences.

    Of a sequence: the sum over experts of `f_e p_e`, where f is the number of tokens for which an expert is among the
    `top_k` highest scores, relative to what each would have if all had equally many, and p the mean of its scores,
    divided for each token by their sum. 1 if all experts are alike; up to `E / top_k` if the same ones are chosen for
    every token. The gradient goes through p alone. Sequences count by themselves, so that the sum over a batch does
    not depend on how it is divided over ranks and micro-batches.

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20; after Fedus et al., arXiv:2101.03961, eq. 4.

    Args:
        logits_SBE: Of a router.
        keep_SB: Which tokens count.
        top_k: Experts of a token.
        sigmoid: Whether scores are sigmoids.
    """
    scores_SBE = _log_distribution(logits_SBE, sigmoid=sigmoid).exp()
    chosen_SBK = logits_SBE.detach().topk(top_k, dim=-1).indices
    keep_SB1 = keep_SB[..., None]
    routed_BE = torch.zeros_like(scores_SBE).scatter(-1, chosen_SBK, 1.0).mul(keep_SB1).sum(0)
    mass_BE = torch.where(keep_SB1, scores_SBE, 0).sum(0)
    tokens_B = keep_SB.sum(0).clamp(min=1)  # of a sequence without any, all sums are zero
    per_sequence_B = (routed_BE * mass_BE).sum(-1) / tokens_B
    return per_sequence_B.sum() * (logits_SBE.shape[-1] / top_k)


def _log_distribution(logits_TE: Tensor, *, sigmoid: bool) -> Tensor:
    wide = at_least_fp32(logits_TE)
    if not sigmoid:
        return wide.log_softmax(-1)
    log_scores = torch.nn.functional.logsigmoid(wide)
    return log_scores - log_scores.logsumexp(-1, keepdim=True)
