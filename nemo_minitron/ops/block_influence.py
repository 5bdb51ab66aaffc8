"""How much a layer changes the residual stream: Block Influence is the mean over kept tokens of `dissimilarity`.

Source: Men et al., arXiv:2403.03853, eq. (1). It takes the complete hidden dimension; every rank passes its own tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron.ops.memory import Workspace


class Stream(NamedTuple):
    """States of the residual stream, `[s * b, h]` and their lengths `[s * b]`, both float32 or float64."""

    states: Tensor
    norms: Tensor


def stream_of(x_SBH: Tensor, workspace: Workspace, name: str) -> Stream:
    """A copy of the states in the workspace, under a name, with their lengths."""
    wide = torch.float64 if x_SBH.dtype == torch.float64 else torch.float32
    states = workspace.take(name, x_SBH.shape, wide, x_SBH.device).copy_(x_SBH).flatten(0, 1)
    return Stream(states, torch.linalg.vector_norm(states, dim=-1))


def dissimilarity(before: Stream, after: Stream) -> Tensor:
    """1 - cos of every pair of states, `[s * b]`; overwrites the states of `before`.

    With d the length of the difference and a, b those of the states, `1 - cos = (d^2 - (a - b)^2) / (2 a b)`: exact to
    rounding even where a layer does next to nothing, which 1 - dot / (a b) is not. A state of all zeros has no
    direction; its cosine counts as 0.
    """
    change = torch.linalg.vector_norm(before.states.sub_(after.states), dim=-1)
    product = before.norms * after.norms
    shrink = (before.norms - after.norms).square_()
    return torch.where(product > 0, change.square_().sub_(shrink).div_(2 * product), 1.0)
