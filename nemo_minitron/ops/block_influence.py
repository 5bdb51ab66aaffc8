"""How much a layer changes the residual stream."""

import torch
from torch import Tensor

# A state of all zeros has no direction; the floor makes its cosine 0 instead of NaN.
_TINY = 1e-30


def token_dissimilarity(x_in_SBH: Tensor, x_out_SBH: Tensor) -> Tensor:
    """1 - cos(input, output) of every token, `[s, b]`, in [0, 2]; higher means that the layer does more.

    Computed in float32 (float64 for float64). Block Influence is its mean over kept tokens; the caller sums and counts.
    Placement: needs the whole hidden dimension; under sequence or context parallelism every rank passes its own
    tokens. No gradient is meant to be taken. Source: Men et al., arXiv:2403.03853, eq. (1).
    """
    x_in, x_out = _at_least_float32(x_in_SBH), _at_least_float32(x_out_SBH)
    dot, in_square, out_square = (torch.linalg.vecdot(a, b) for a, b in ((x_in, x_out), (x_in, x_in), (x_out, x_out)))
    cosine: Tensor = dot / (in_square.sqrt() * out_square.sqrt()).clamp_min(_TINY)
    return 1 - cosine


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
