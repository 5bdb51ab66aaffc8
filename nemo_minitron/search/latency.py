"""Latency of shapes from a small table of timed layers, interpolated between its points."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch.axes import PrunableAxis, size_divisor
from nemo_minitron.arch.families.hybrid import first_mamba
from nemo_minitron.arch.layer import Attention, FeedForward, Mamba, Mixer, Mlp
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.config.budget import DeploymentConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.axes import SearchAxis, axes_of, layer_places, layers_by_kind, place_of

FORMAT = "nemo_minitron.latency"
VERSION = 1
PHASES = ("prefill", "decode")
PART_AXES: dict[str, tuple[str, ...]] = {
    "attention": ("hidden", "groups", "ratio"),
    "mlp": ("hidden", "ffn"),
    "mamba": ("hidden", "mamba_groups", "mamba_ratio", "mamba_channels"),
    "head": ("hidden",),
}
"""Axes of the parts of a model that are timed, as rows of `arch.axes` name them; a ratio is heads for each group."""
_PART_OF: dict[type[Mixer | FeedForward], str] = {Attention: "attention", Mamba: "mamba", Mlp: "mlp"}


def parts_of(grid: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that a table of these axes holds."""
    return tuple(part for part, axes in PART_AXES.items() if set(axes) <= grid.keys())


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a table was timed for. Two tables of equal conditions can stand for each other.

    Attributes:
        device: Name of the GPU, or of the processor with its number of threads.
        dtype: Of weights and activations.
        batch_size: Sequences of a step.
        sequence_length: Tokens of a prompt; positions that a generated token attends to.
        head_dim: Channels of a head.
        vocab_size: Rows of the output layer.
        gated: Whether the MLP has a gate.
        state_size: Channels of a Mamba state; 0 without Mamba.
        conv_kernel: Positions that Mamba's convolution sees.
    """

    device: str
    dtype: str
    batch_size: int
    sequence_length: int
    head_dim: int
    vocab_size: int
    gated: bool
    state_size: int = 0
    conv_kernel: int = 0

    @classmethod
    def of(cls, teacher: ModelSpec, deployment: DeploymentConfig, device: str) -> Self:
        """What a search needs."""
        mamba = first_mamba(teacher)
        return cls(
            device=device,
            dtype=deployment.dtype.value,
            batch_size=deployment.batch_size,
            sequence_length=deployment.sequence_length,
            head_dim=teacher.head_dim,
            vocab_size=teacher.vocab_size,
            gated=teacher.activation.gated,
            state_size=0 if mamba is None else mamba.mamba_state_dim,
            conv_kernel=0 if mamba is None else mamba.conv_kernel,
        )


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Timed parts of a model: attention, Mamba and MLP of one layer, and the output layer.

    Attributes:
        conditions: What it was timed for.
        grid: Points of each axis of its parts, ascending; see `PART_AXES`.
        milliseconds: By phase (`prefill`, `decode`) and part, nested lists over the axes of the part.
        error: Median and maximum of the relative error on shapes that are not in the table, and their number.
    """

    conditions: Conditions
    grid: dict[str, list[int]]
    milliseconds: dict[str, dict[str, Any]]
    error: dict[str, float]

    def model_ms(self, phase: str, teacher: ModelSpec, sizes: Sequence[Any]) -> Any:
        """Milliseconds of shapes of a teacher, its layers one after the other.

        Args:
            phase: `prefill`, for a batch of prompts, or `decode`, for one token of each sequence of a batch.
            teacher: Which parts layers have.
            sizes: One integer or integer array for each axis of the search.
        """
        axes = axes_of(teacher)
        numbers = layer_places(axes)
        total = self._part(phase, "head", axes, sizes)
        for kind, layer in layers_by_kind(teacher).items():
            each = sum(self._part(phase, _PART_OF[type(part)], axes, sizes) for part in layer.parts)
            total = total + sizes[numbers[kind]] * each
        return total

    def part_ms(self, phase: str, part: str, point: Sequence[Any]) -> Any:
        """Milliseconds of one part, interpolated linearly along each axis.

        Args:
            phase: `prefill` or `decode`.
            part: One of `parts_of(grid)`.
            point: A number or array for each axis of the part; arrays broadcast against one another.

        Raises:
            SearchError: A size lies outside the table.
        """
        grids = [self.grid[axis] for axis in PART_AXES[part]]
        for axis, grid, values in zip(PART_AXES[part], grids, point, strict=True):
            low, high = np.min(values), np.max(values)
            if low < grid[0] or high > grid[-1]:
                raise SearchError(
                    f"latency table: {axis} from {low} to {high}, timed from {grid[0]} to {grid[-1]}",
                    rule="the table covers the sizes of the search",
                    remedy="make the table anew with this recipe: `nemo-minitron latency RECIPE`",
                )
        return interpolate(np.array(self.milliseconds[phase][part], dtype=float), grids, point)

    def _part(self, phase: str, part: str, axes: Sequence[SearchAxis], sizes: Sequence[Any]) -> Any:
        return self.part_ms(phase, part, [self._coordinate(name, axes, sizes) for name in PART_AXES[part]])

    def _coordinate(self, name: str, axes: Sequence[SearchAxis], sizes: Sequence[Any]) -> Any:
        """Where shapes lie on an axis of the table."""
        row = next(axis.row for axis in axes if axis.row.timed == name)
        size, outer = sizes[_place(axes, row)], size_divisor(row)
        if outer is None:
            return size
        # Combinations that no model can have are ruled out elsewhere; here they only must not leave the table.
        return np.clip(np.divide(size, sizes[_place(axes, outer)]), self.grid[name][0], self.grid[name][-1])

    def save(self, path: Path) -> None:
        """Write JSON under a temporary name, then put it in place."""
        with staged_file(path) as partial:
            partial.write_text(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, expected: Conditions) -> Self:
        """Read a table for a search.

        Raises:
            SearchError: It is missing or damaged, or was timed for something else, as another device.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if (data.pop("format"), data.pop("version")) != (FORMAT, VERSION):
                raise ValueError("another format or version")
            table = cls(**{**data, "conditions": Conditions(**data["conditions"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SearchError(
                f"target.deployment.latency_table: {path}: cannot be read ({error})",
                rule="a file of `nemo-minitron latency`",
            ) from error
        differing = [
            f"{field.name} is {found}, the search has {wanted}"
            for field in fields(Conditions)
            if (found := getattr(table.conditions, field.name)) != (wanted := getattr(expected, field.name))
        ]
        if differing:
            raise SearchError(
                f"target.deployment.latency_table: {path}: timed for something else: " + "; ".join(differing),
                rule="latencies hold for one device and one way to use it",
                remedy="make a table where the student will run (`nemo-minitron latency`); if that is another machine "
                "than this one, name it: target.deployment.device",
            )
        return table


def _place(axes: Sequence[SearchAxis], row: PrunableAxis) -> int:
    place = place_of(axes, row.axis)
    assert place is not None, "a part is timed for models that have it"
    return place


def interpolate(values: NDArray[np.float64], grids: Sequence[Sequence[int]], point: Sequence[Any]) -> Any:
    """Multilinear interpolation.

    Args:
        values: `[points of each axis]`.
        grids: Points of each axis, ascending.
        point: Where; arrays that broadcast against one another.
    """
    places, weights = [], []
    for grid, where in zip(grids, point, strict=True):
        left = np.clip(np.searchsorted(grid, where, side="right") - 1, 0, max(len(grid) - 2, 0))
        right = np.minimum(left + 1, len(grid) - 1)
        low, high = np.take(grid, left), np.take(grid, right)
        weight = np.where(high > low, (np.asarray(where) - low) / np.maximum(high - low, 1), 0.0)
        places.append((left, right))
        weights.append((1 - weight, weight))
    total: Any = 0.0
    for corner in product((0, 1), repeat=len(grids)):
        index = tuple(pair[side] for pair, side in zip(places, corner, strict=True))
        share: Any = 1.0
        for pair, side in zip(weights, corner, strict=True):
            share = share * pair[side]
        total = total + share * values[index]
    return total
