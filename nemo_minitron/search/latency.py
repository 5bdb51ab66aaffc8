"""Latency of shapes from a small table of timed layers, interpolated between its points."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.config.budget import DeploymentConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.axes import NAMES

FORMAT = "nemo_minitron.latency"
VERSION = 1
PHASES = ("prefill", "decode")
_AXES = {"attention": ("hidden", "groups", "ratio"), "mlp": ("hidden", "ffn"), "head": ("hidden",)}
PARTS = tuple(_AXES)


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
    """

    device: str
    dtype: str
    batch_size: int
    sequence_length: int
    head_dim: int
    vocab_size: int
    gated: bool

    @classmethod
    def of(cls, teacher: ModelSpec, deployment: DeploymentConfig, device: str) -> Self:
        """What a search needs."""
        return cls(
            device=device,
            dtype=deployment.dtype.value,
            batch_size=deployment.batch_size,
            sequence_length=deployment.sequence_length,
            head_dim=teacher.head_dim,
            vocab_size=teacher.vocab_size,
            gated=teacher.activation.gated,
        )


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Timed parts of a model: attention and MLP of one layer, and the output layer.

    Attributes:
        conditions: What it was timed for.
        grid: Points of each axis, ascending: `hidden`, `ffn`, `groups`, and `ratio`, query heads per KV group.
        milliseconds: By phase (`prefill`, `decode`) and part, nested lists over the axes of the part.
        error: Median and maximum of the relative error on shapes that are not in the table, and their number.
    """

    conditions: Conditions
    grid: dict[str, list[int]]
    milliseconds: dict[str, dict[str, Any]]
    error: dict[str, float]

    def prefill_ms(self, sizes: Sequence[Any]) -> Any:
        """Milliseconds for a batch of prompts, for one integer or integer array for each axis of the search."""
        return self._model("prefill", sizes)

    def decode_ms(self, sizes: Sequence[Any]) -> Any:
        """Milliseconds for one token of each sequence of a batch."""
        return self._model("decode", sizes)

    def part_ms(self, phase: str, part: str, point: Sequence[Any]) -> Any:
        """Milliseconds of one part, interpolated linearly along each axis.

        Args:
            phase: `prefill` or `decode`.
            part: One of `PARTS`.
            point: A number or array for each axis of the part; arrays broadcast against one another.

        Raises:
            SearchError: A size lies outside the table.
        """
        grids = [self.grid[axis] for axis in _AXES[part]]
        for axis, grid, values in zip(_AXES[part], grids, point, strict=True):
            low, high = np.min(values), np.max(values)
            if low < grid[0] or high > grid[-1]:
                raise SearchError(
                    f"latency table: {axis} from {low} to {high}, timed from {grid[0]} to {grid[-1]}",
                    rule="the table covers the sizes of the search",
                    remedy="make the table anew with this recipe: `nemo-minitron latency RECIPE`",
                )
        return interpolate(np.array(self.milliseconds[phase][part], dtype=float), grids, point)

    def _model(self, phase: str, sizes: Sequence[Any]) -> Any:
        layers, hidden, ffn, heads, groups = (
            sizes[NAMES.index(name)]
            for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        )
        # Combinations that no model can have are ruled out elsewhere; here they only must not leave the table.
        ratio = np.clip(np.divide(heads, groups), self.grid["ratio"][0], self.grid["ratio"][-1])
        layer = self.part_ms(phase, "attention", (hidden, groups, ratio)) + self.part_ms(phase, "mlp", (hidden, ffn))
        return layers * layer + self.part_ms(phase, "head", (hidden,))

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
