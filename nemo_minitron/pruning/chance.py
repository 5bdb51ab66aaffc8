"""Importance drawn by lot, the baseline that every score must beat: a function of the seed alone, on every machine."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.arch.axes import Axis, row_of
from nemo_minitron.arch.spec import ModelSpec


class RandomImportance:
    """A number in [0, 1) for every unit, in place of `Scores`.

    A unit's number comes from SHAKE-256 over seed, axis and layer, so that no library's generator has a say, and that
    one axis's lots are the same whatever else is pruned. Aggregations have no say.

    Args:
        spec: The model.
        seed: Equal seeds give equal numbers.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed

    def importance(
        self,
        axis: Axis,
        layer: int | None = None,
        *,
        batch: str = "",
        sequence: str = "",
        experts: str = "",
        kept: Mapping[Axis, Tensor] | None = None,
    ) -> Tensor:
        """For each unit of an axis of the model, or of one of its layers, `[units]`."""
        row = row_of(axis)
        return self._lots(
            row.plan if layer is None else f"{row.plan}.{layer}",
            self.spec.size(row) if layer is None else self.spec.units(row, layer),
        )

    def ranked_parts(self, part: str, layers: list[int]) -> list[int]:
        """Layers in the order in which a part of them would go."""
        lots = self._lots(part, self.spec.num_layers).tolist()
        return sorted(layers, key=lambda layer: lots[layer])

    def _lots(self, axis: str, count: int) -> Tensor:
        drawn = hashlib.shake_256(f"nemo_minitron/{self.seed}/{axis}".encode()).digest(8 * count)
        # 53 bits, which a float64 holds exactly.
        numbers = [int.from_bytes(drawn[start : start + 8], "big") >> 11 for start in range(0, 8 * count, 8)]
        return torch.tensor(numbers, dtype=torch.float64) / 2**53
