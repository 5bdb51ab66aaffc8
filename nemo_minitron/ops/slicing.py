"""Cutting a tensor down to the units that stay."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.errors import PlanError


def slice_dims(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Keep the given indices along each dimension (in the order given); the result is a contiguous copy.

    Args:
        tensor: Any shape.
        keep: Dimension -> int64 indices. Dimensions not named stay whole.

    Raises:
        PlanError: An index is out of range.
    """
    original = tensor
    # The dimension that shrinks most goes first, so that the intermediate copies are small.
    for dim in sorted(keep, key=lambda dim: keep[dim].numel() / max(tensor.shape[dim], 1)):
        indices = keep[dim]
        size = tensor.shape[dim]
        lowest, highest = (int(indices.min()), int(indices.max())) if indices.numel() else (0, -1)
        if lowest < 0 or highest >= size:
            raise PlanError(
                f"indices from {lowest} to {highest} along dimension {dim} of {tuple(tensor.shape)}",
                rule=f"indices lie in 0..{size - 1}",
            )
        if not _is_everything(indices, size):
            tensor = tensor.index_select(dim, indices)
    return (
        tensor
        if tensor.is_contiguous() and tensor is not original
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _is_everything(indices: Tensor, size: int) -> bool:
    return indices.numel() == size and torch.equal(indices, torch.arange(size))
