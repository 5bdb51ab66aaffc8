"""Cutting a tensor down to the units that stay."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.errors import PlanError
from nemo_minitron.ops.memory import empty

_BLOCK_BYTES = 1 << 22
"""Rows are cut in blocks that stay in the processor's cache between the two dimensions."""

# numpy knows no bfloat16; moving elements needs their size only.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def slice_dims(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Keep the given indices along each dimension (in the order given); the result is a contiguous copy.

    Args:
        tensor: Any shape.
        keep: Dimension -> int64 indices. Dimensions not named stay whole.

    Raises:
        PlanError: An index is out of range.
    """
    cuts = {dim: indices for dim, indices in keep.items() if not _is_everything(tensor, dim, indices)}
    shape = tuple(cuts[dim].numel() if dim in cuts else size for dim, size in enumerate(tensor.shape))
    if any(dim > 1 for dim in cuts) or (1 in cuts and tensor.dim() > 2):
        # The dimension that shrinks most goes first, so that the intermediate copies are small.
        for dim in sorted(cuts, key=lambda dim: cuts[dim].numel() / max(tensor.shape[dim], 1)):
            tensor = tensor.index_select(dim, cuts[dim])
        return tensor.contiguous()
    out = empty(shape, tensor.dtype)
    if 1 in cuts:
        _cut_matrix(tensor, cuts.get(0), cuts[1], out)
    elif 0 in cuts:
        torch.index_select(tensor, 0, cuts[0], out=out)
    else:
        out.copy_(tensor)
    return out


def _cut_matrix(matrix: Tensor, rows: Tensor | None, columns: Tensor, out: Tensor) -> None:
    """Rows by copying whole ones, then columns by numpy's `take`, ten times as fast as torch's `index_select` there."""
    bits = _BITS[matrix.element_size()]
    source, target, wanted = matrix.view(bits), out.view(bits).numpy(), columns.numpy()
    step = max(1, _BLOCK_BYTES // max(1, matrix.shape[1] * matrix.element_size()))
    for start in range(0, len(out), step):
        stop = min(start + step, len(out))
        block = source[start:stop] if rows is None else source.index_select(0, rows[start:stop])
        # mode="clip" takes straight into `out`; "raise" goes through a copy. The indices have been checked.
        np.take(block.numpy(), wanted, axis=1, out=target[start:stop], mode="clip")


def _is_everything(tensor: Tensor, dim: int, indices: Tensor) -> bool:
    """Whether indices name a whole dimension in order.

    Raises:
        PlanError: One is out of range.
    """
    size = tensor.shape[dim]
    lowest, highest = (int(indices.min()), int(indices.max())) if indices.numel() else (0, -1)
    if lowest < 0 or highest >= size:
        raise PlanError(
            f"indices from {lowest} to {highest} along dimension {dim} of {tuple(tensor.shape)}",
            rule=f"indices lie in 0..{size - 1}",
        )
    return indices.numel() == size and torch.equal(indices, torch.arange(size))
