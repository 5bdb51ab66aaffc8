"""How much a layer changes the residual stream."""

import torch
from torch import Tensor

# A state of all zeros has no direction; the floor makes its cosine 0 instead of NaN.
_TINY = 1e-30
# Tokens whose wide copies stay in a core's cache, times hidden size.
_BLOCK_ELEMENTS = 1 << 17


def token_dissimilarity(x_in_SBH: Tensor, x_out_SBH: Tensor) -> Tensor:
    """1 - cos(input, output) of every token, `[s, b]`, in [0, 2]; higher means that the layer does more.

    Computed in float32 (float64 for float64). Block Influence is its mean over kept tokens; the caller sums and counts.
    Placement: needs the whole hidden dimension; under sequence or context parallelism every rank passes its own
    tokens. Inputs are left unchanged; no gradient is meant to be taken. Source: Men et al., arXiv:2403.03853, eq. (1).
    """
    x_in, x_out = x_in_SBH.flatten(0, 1), x_out_SBH.flatten(0, 1)
    tokens, hidden = x_in.shape
    wide = torch.float64 if x_in.dtype == torch.float64 else torch.float32
    rows = max(1, _BLOCK_ELEMENTS // hidden) if x_in.device.type == "cpu" else max(1, tokens)
    a_RH, b_RH = torch.empty((2, min(rows, tokens), hidden), dtype=wide, device=x_in.device)
    norms_3N = torch.empty((3, tokens), dtype=wide, device=x_in.device)
    for start in range(0, tokens, rows):
        dot, in_norm, out_norm = norms_3N[:, start : start + rows].unbind()
        a, b = (
            a_RH[: dot.shape[0]].copy_(x_in[start : start + rows]),
            b_RH[: dot.shape[0]].copy_(x_out[start : start + rows]),
        )
        torch.linalg.vector_norm(a, dim=-1, out=in_norm)
        torch.linalg.vector_norm(b, dim=-1, out=out_norm)
        torch.sum(a.mul_(b), -1, out=dot)
    cosine: Tensor = norms_3N[0] / (norms_3N[1] * norms_3N[2]).clamp_min(_TINY)
    return (1 - cosine).view(x_in_SBH.shape[:2])
