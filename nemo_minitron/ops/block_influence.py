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
    rows = max(1, _BLOCK_ELEMENTS // hidden) if x_in.device.type == "cpu" else max(1, tokens)
    result = torch.empty(tokens, dtype=_wide(x_in), device=x_in.device)
    for start in range(0, tokens, rows):
        block = slice(start, start + rows)
        result[block] = 1 - _cosine(x_in[block], x_out[block])
    return result.view(x_in_SBH.shape[:2])


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.to(_wide(x)), y.to(_wide(y))
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    return (x * y).sum(-1) / norms.clamp_min(_TINY)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
