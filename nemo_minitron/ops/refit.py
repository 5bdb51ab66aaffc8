"""Ridge regression from second moments: a linear map that loses inputs, or takes on what another map did."""

import torch
from torch import Tensor


def refit_change(weight_HF: Tensor, kept_K: Tensor, moment_FF: Tensor, cross_FH: Tensor, *, ridge: float) -> Tensor:
    """What to add to the kept columns of a linear map so that they do all of its work, and more.

    For inputs `a` of the map and a vector `r` that should come out besides `W a`, both over calibration tokens, it is
    the `D` that minimizes

        sum |(W_kept + D) a_kept - (W a + r)|^2 + ridge * sum_k (sum a_k^2) |D_k|^2.

    The penalty is relative to each input's own second moment, since in gated MLPs these differ by orders of magnitude.
    It pulls towards the weights as they are. Inputs that never differ from zero get no change.

    Args:
        weight_HF: The complete map.
        kept_K: Which of its inputs stay, ascending.
        moment_FF: `sum a a^T`.
        cross_FH: `sum a r^T`.
        ridge: Above 0.

    Returns:
        `[H, K]` float64.
    """
    moment, cross, weight = moment_FF.double(), cross_FH.double(), weight_HF.double()
    dropped = torch.ones(len(moment), dtype=torch.bool)
    dropped[kept_K] = False
    wanted_KH = cross[kept_K] + moment[kept_K][:, dropped] @ weight[:, dropped].t()
    square_KK = moment[kept_K][:, kept_K]
    power_K = square_KK.diagonal()
    scale_K = torch.where(power_K > 0, power_K, 1).rsqrt()
    correlation = square_KK * scale_K * scale_K[:, None]
    correlation.diagonal().add_(ridge)
    change_KH = torch.cholesky_solve(wanted_KH * scale_K[:, None], torch.linalg.cholesky(correlation))
    return (change_KH * scale_K[:, None]).t()
