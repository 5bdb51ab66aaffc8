"""Which of the shapes that fit become candidates: those that differ most, and the baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.search.axes import Sizes, layer_places, sizes_of
from nemo_minitron.search.measures import Measure
from nemo_minitron.search.space import Found, Space

UNIFORM, DEPTH = "uniform scaling", "depth alone"
_LARGEST = 200_000
"""Shapes that distances are taken between; of more, evenly many are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An architecture in the race.

    Attributes:
        sizes: For each of the teacher's axes, as `search.axes.axes_of` has them.
        name: Short and unambiguous.
        label: What it stands for, if it is a baseline.
    """

    sizes: Sizes
    name: str
    label: str = ""


def choose_candidates(
    space: Space, found: Found, count: int, measured: Mapping[str, Measure], limits: Mapping[str, float]
) -> list[Candidate]:
    """The baselines, then shapes that are each as far as possible from all before (greedy farthest point).

    Distances are between logarithms of sizes, so that a step from 32 to 28 layers is as far as one from 4096 to 3584
    channels.

    Args:
        space: Where the shapes are from.
        found: The shapes that fit.
        count: Number of candidates; all that fit if there are no more.
        measured: For the depth baseline, which need not use a budget to `1 - search.tolerance`.
        limits: Upper limits.
    """
    rows = found.shapes
    if len(rows) > _LARGEST:
        rows = rows[np.linspace(0, len(rows) - 1, _LARGEST).astype(int)]

    def candidate(sizes: Sizes, label: str = "") -> Candidate:
        return Candidate(sizes=sizes, name=space.short_name(sizes), label=label)

    candidates = [candidate(uniform_scaling(space, found), UNIFORM)]
    depth = depth_alone(space, measured, limits)
    if depth is not None and count > 1 and depth != candidates[0].sizes:
        candidates.append(candidate(depth, DEPTH))
    points = np.log(rows)
    nearest = np.full(len(rows), np.inf)
    for each in candidates:
        nearest = np.minimum(nearest, _distance(points, np.log(each.sizes)))
    while len(candidates) < count and nearest.max() > 0:
        place = int(nearest.argmax())
        candidates.append(candidate(tuple(int(size) for size in rows[place])))
        nearest = np.minimum(nearest, _distance(points, points[place]))
    return candidates


def uniform_scaling(space: Space, found: Found) -> Sizes:
    """The shape whose free axes come nearest to one common factor; of equals, the one that uses the budget best."""
    teacher = np.array(sizes_of(space.teacher))
    free = list(space.free)
    if not free:
        return tuple(int(size) for size in found.shapes[0])
    scales = np.log(found.shapes[:, free] / teacher[free])
    spread: NDArray[np.float64] = scales.max(axis=1) - scales.min(axis=1)
    best = np.lexsort((-found.use, spread.round(9)))[0]
    return tuple(int(size) for size in found.shapes[best])


def depth_alone(space: Space, measured: Mapping[str, Measure], limits: Mapping[str, float]) -> Sizes | None:
    """The deepest shape within the budgets that has the space's largest size on every other axis.

    Of layers of several kinds, as large a part of each stays, as far as the space has such numbers.

    Returns:
        None if no shape of the space is that, or if the numbers of layers are fixed.
    """
    numbers = set(layer_places(space.axes).values())
    if not numbers & set(space.free):
        return None
    total = sum(space.values[place][-1] for place in numbers)
    for layers in range(total, 0, -1):
        sizes = tuple(
            _nearest(values, layers * values[-1] / total) if place in numbers else values[-1]
            for place, values in enumerate(space.values)
        )
        if not space.allowed([np.array(size) for size in sizes]).all():
            continue
        if all(measured[name](sizes) <= limit for name, limit in limits.items()):
            return sizes
    return None


def _nearest(values: Sequence[int], wanted: float) -> int:
    """The value that is nearest to what is wanted; of equals the larger one."""
    return min(values, key=lambda value: (abs(value - wanted), -value))


def _distance(points: NDArray[np.float64], place: NDArray[np.float64]) -> NDArray[np.float64]:
    distance: NDArray[np.float64] = np.square(points - place).sum(axis=1)
    return distance
