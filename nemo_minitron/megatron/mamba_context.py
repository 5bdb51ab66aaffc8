"""Mamba under context parallelism: a rank gives away its positions of most heads for all positions of some.

The convolution and the scan run along the positions that context parallelism splits. So before them each rank sends
every other one what that one's heads need of its positions, and behind them it gets its own positions of all heads
back: an all-to-all each way, as in Megatron's mixer. Every rank has the complete weights and takes its heads' rows of
them; gradients of the other rows are zero there, and the sum over ranks that all gradients go through completes them.

The gate and the norm need no other position and stay where they are, so that the heads of a group may be on several
ranks (`config.parallel.mamba_split`), each of which then has a copy of the group's maps.

Shapes: S all positions, L those of this rank, B samples, W channels.
"""

from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.config.parallel import mamba_split

_SCANNED = ("x", "B", "C", "dt")
"""Parts of the input projection that the scan needs of other positions."""
_MAPS = ("B", "C")
"""Those that the heads of a group share."""


class HeadExchange:
    """Which heads of a mixer a context-parallel rank scans, and how it gets them.

    Args:
        parts: Rows of each part of the input projection on this tensor-parallel rank, by letter.
        groups: Groups of heads among them.
        group: Context-parallel ranks, which hold the same heads and different positions.

    Attributes:
        rows: Of each part that the scan needs, those of the heads of this rank.
    """

    def __init__(self, parts: Mapping[str, int], groups: int, group: ProcessGroup) -> None:
        self._group, self._parts = group, parts
        self._sets, self._shares = mamba_split(groups, group.size())
        self._groups = groups // self._sets
        self._set, self._share = divmod(group.rank(), self._shares)
        whole, maps = group.size(), self._sets
        self.rows = {letters: parts[letters] // (maps if letters in _MAPS else whole) for letters in _SCANNED}

    def weight(self, part: Tensor, letters: str) -> Tensor:
        """This rank's rows of one part of a weight.

        Args:
            part: `[rows of the tensor-parallel rank, ...]`.
            letters: Which part.
        """
        if letters in _MAPS:
            return part.chunk(self._sets)[self._set]
        cut = part.view(self._sets, self._groups, self._shares, -1, *part.shape[1:])
        return cut[self._set, :, self._share].flatten(0, 1)

    def convolved(self, weight: Tensor) -> Tensor:
        """This rank's rows of a weight of the convolution, `[rows of x, B and C, ...]`."""
        return torch.cat([self.weight(part, letters) for letters, part in self._convolved(weight, dim=0).items()])

    def to_heads(self, inner_BLW: Tensor, dt_BLW: Tensor) -> tuple[Tensor, Tensor]:
        """What the scan needs of all positions, in their order, and of this rank's heads.

        Args:
            inner_BLW: x, B and C side by side, of all heads and this rank's positions.
            dt_BLW: Likewise.

        Returns:
            Both, `[B, S, W]` each.
        """
        parts = self._convolved(inner_BLW, dim=-1) | {"dt": dt_BLW}
        sent = torch.cat([self._by_rank(part.transpose(0, 1), letters) for letters, part in parts.items()], dim=-1)
        sets, shares, length, batch, width = sent.shape
        halves = all_to_all(self._group, sent.flatten(0, 1)).view(sets * shares, 2, length // 2, batch, width)
        # Of twice as many pieces as ranks, each rank has one from either end (`MicroBatch.on_context_rank`).
        pieces = torch.cat([halves[:, 0], halves[:, 1].flip(0)])
        steps = self.rows["dt"]
        inner, dt = torch.split(pieces.flatten(0, 1).transpose(0, 1), [width - steps, steps], dim=-1)
        return inner, dt

    def to_positions(self, y_BSW: Tensor) -> Tensor:
        """What the scan returns, of all heads and this rank's positions: `[B, L, W]`."""
        ranks, batch, length = self._group.size(), *y_BSW.shape[:2]
        first, second = y_BSW.transpose(0, 1).reshape(2, ranks, length // ranks // 2, batch, -1)
        sent = torch.stack([first, second.flip(0)], dim=1)
        shape = (self._sets, self._shares, length // ranks, batch, self._groups, -1)
        return all_to_all(self._group, sent).view(shape).permute(3, 2, 0, 4, 1, 5).flatten(2)

    def _convolved(self, inner: Tensor, *, dim: int) -> dict[str, Tensor]:
        """The parts that the convolution passes over."""
        return dict(zip("xBC", torch.split(inner, [self._parts[letters] for letters in "xBC"], dim=dim), strict=True))

    def _by_rank(self, part_LBW: Tensor, letters: str) -> Tensor:
        """What each rank is sent of a part, `[sets, shares, L, B, W]`."""
        length, batch, _ = part_LBW.shape
        if letters in _MAPS:
            maps = part_LBW.reshape(length, batch, self._sets, -1).permute(2, 0, 1, 3)
            return maps[:, None].expand(-1, self._shares, -1, -1, -1)
        cut = part_LBW.reshape(length, batch, self._sets, self._groups, self._shares, -1)
        return cut.permute(2, 4, 0, 1, 3, 5).flatten(4)
