"""The space of a search: the sizes of each axis, the rules they keep, and the shapes that stay within the budgets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, lcm, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch.axes import PrunableAxis
from nemo_minitron.arch.sizes import fraction_of
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.sizes import AxisConfig, TargetConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.axes import (
    AXES,
    EXPERTS,
    GROUPS,
    HEADS,
    LAYERS,
    Sizes,
    axes_of,
    named,
    short_name,
    sizes_of,
    step_of,
)
from nemo_minitron.search.counts import IntArray
from nemo_minitron.search.measures import Measure, describe

_CHUNK = 2_000_000
"""Shapes that are measured at one time: enough for long loops, little enough for the processor's caches."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Sizes of each axis, ascending, and what the combinations must keep to."""

    teacher: ModelSpec
    values: tuple[tuple[int, ...], ...]
    """For each of the teacher's axes, as `search.axes.axes_of` has them."""

    @property
    def size(self) -> int:
        """Number of combinations."""
        return prod(map(len, self.values))

    @property
    def free(self) -> tuple[int, ...]:
        """Places of the axes that have a choice."""
        return tuple(index for index, values in enumerate(self.values) if len(values) > 1)

    def chunks(self) -> Iterator[list[IntArray]]:
        """The space in parts: for each axis an array that broadcasts against the others."""
        rest = prod(map(len, self.values[1:]))
        rows = max(1, _CHUNK // max(rest, 1))
        first = np.array(self.values[0], dtype=np.int64)
        for start in range(0, len(first), rows):
            parts = [first[start : start + rows], *(np.array(values, dtype=np.int64) for values in self.values[1:])]
            yield list(np.ix_(*parts))

    def allowed(self, sizes: Sequence[IntArray]) -> NDArray[np.bool_]:
        """Which query heads can be cut out of the teacher's groups: a multiple of the groups, no more to each."""
        heads, groups = sizes[HEADS], sizes[GROUPS]
        teacher = sizes_of(self.teacher)
        most = teacher[HEADS] // teacher[GROUPS]
        result: NDArray[np.bool_] = (heads % groups == 0) & (heads // groups <= most)
        return result


@dataclass(kw_only=True)
class Found:
    """The shapes that keep to the rules and the budgets."""

    shapes: IntArray
    """`[shapes, axes]`."""
    use: NDArray[np.float64]
    """Of each, the largest fraction of a budget that it takes."""
    total: int
    """Combinations of sizes."""
    ruled_out: int = 0
    """Combinations that no model can have."""
    above: dict[str, int] = field(default_factory=dict)
    """Shapes above each budget."""
    below: int = 0
    """Shapes within every budget that leave too much of all of them unused."""


def make_space(search: SearchConfig, target: TargetConfig, teacher: ModelSpec, parallel: ParallelConfig) -> Space:
    """The space that a recipe asks for.

    Raises:
        SearchError: Rules contradict each other; names all that do.
        SpecError: The teacher's layers differ in size.
    """
    problems: list[str] = []
    shared = lcm(parallel.tensor, target.deployment.tensor_parallel)
    values = []
    divisors = {"tensor": shared, "expert": parallel.expert}
    for axis, size in zip(axes_of(teacher), sizes_of(teacher), strict=True):
        wanted: AxisConfig | None = getattr(search.space, axis.size)
        exact: int | float | None = getattr(target, axis.size)
        multiple = lcm(getattr(target.multiple_of, axis.size), divisors.get(axis.divided_by, 1))
        if exact is not None and wanted is not None:
            problems.append(f"target.{axis.size} = {exact} and search.space.{axis.size}: one of them")
            continue
        if exact is not None:
            share = fraction_of(size, exact, step=multiple) if isinstance(exact, float) else exact
            wanted = AxisConfig(values=(share,))
        elif wanted is None and not axis.is_searched:
            wanted = AxisConfig(values=(size,))
        found, wrong = _sizes(axis, wanted or AxisConfig(), size, multiple)
        problems += wrong
        values.append(found)
    if not problems:
        chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
        values[LAYERS] = tuple(size for size in values[LAYERS] if size >= chunks)
        if not values[LAYERS]:
            problems.append(f"search.space.num_layers has fewer layers than parallel.pipeline needs ({chunks})")
        if teacher.has_experts:
            top_k = teacher.layer.moe.top_k
            values[EXPERTS] = tuple(size for size in values[EXPERTS] if size >= top_k)
            if not values[EXPERTS]:
                problems.append(f"search.space.num_experts has fewer experts than a token is routed to ({top_k})")
    if problems:
        raise SearchError(
            "search space: " + "; ".join(problems),
            rule="sizes of the teacher or less, multiples of the step, of target.multiple_of, and of the "
            "tensor-parallel sizes of the run and of the deployment",
            remedy="change search.space, target.multiple_of or parallel.tensor",
        )
    space = Space(teacher=teacher, values=tuple(values))
    heads, groups = (np.array(space.values[index])[shape] for index, shape in ((HEADS, np.s_[:, None]), (GROUPS, None)))
    pair: list[Any] = [0] * len(space.values)
    pair[HEADS], pair[GROUPS] = heads, groups
    if not space.allowed(pair).any():
        raise SearchError(
            f"search space: no number of heads in {list(space.values[HEADS])} goes with KV groups in "
            f"{list(space.values[GROUPS])}",
            rule="heads are a multiple of KV groups, and a group has no more heads than the teacher's",
            remedy=f"change search.space.{AXES[HEADS].size} or search.space.{AXES[GROUPS].size}",
        )
    return space


def _sizes(axis: PrunableAxis, wanted: AxisConfig, size: int, multiple: int) -> tuple[tuple[int, ...], list[str]]:
    """The sizes of one axis, and what is wrong with them."""
    where = f"search.space.{axis.size}"
    if wanted.values is not None:
        found = tuple(sorted(set(wanted.values)))
        wrong = [f"{where}: {value} is above the teacher's {size}" for value in found if value > size]
        wrong += [f"{where}: {value} is not a multiple of {multiple}" for value in found if value % multiple]
        return found, wrong
    step = lcm(wanted.step or lcm(step_of(axis, size), multiple), multiple)
    least, most = (
        ceil(value * size) if isinstance(value, float) else value
        for value in (0.5 if wanted.min is None else wanted.min, size if wanted.max is None else wanted.max)
    )
    if most > size:
        return (), [f"{where}.max = {most} is above the teacher's {size}"]
    if least > most:
        return (), [f"{where}.min = {least} is above max = {most}"]
    choices = set(range(-(-least // step) * step, most + 1, step))
    if wanted.max is None and size % multiple == 0:
        choices.add(size)
    if not choices:
        return (), [f"{where}: no multiple of {step} lies between {least} and {most}"]
    return tuple(sorted(choices)), []


def find_shapes(
    space: Space, measured: Mapping[str, Measure], limits: Mapping[str, float], *, tolerance: float
) -> Found:
    """All shapes that are within every budget and use one of them to at least `1 - tolerance`.

    Args:
        space: What there is to choose from.
        measured: By name of the budget.
        limits: Upper limits, by the same names.
        tolerance: See above.

    Raises:
        SearchError: There is none; says which budget binds, and the nearest shape.
    """
    result = Found(shapes=np.empty((0, len(space.values)), np.int64), use=np.empty(0), total=space.size)
    result.above = dict.fromkeys(limits, 0)
    parts, uses = [], []
    nearest = _Nearest()
    for sizes in space.chunks():
        shape = np.broadcast_shapes(*(axis.shape for axis in sizes))
        allowed = space.allowed(sizes)
        weight = prod(shape) // allowed.size
        result.ruled_out += int(allowed.size - np.count_nonzero(allowed)) * weight
        use: Any = None
        for name, limit in limits.items():
            share = np.divide(measured[name](sizes), limit)
            result.above[name] += _count((share > 1) & allowed, shape)
            use = share if use is None else np.maximum(use, share)
        passing = (use <= 1) & (use >= 1 - tolerance) & allowed
        result.below += _count((use < 1 - tolerance) & allowed, shape)
        places = np.nonzero(np.broadcast_to(passing, shape))
        parts.append(np.stack([axis.ravel()[at] for axis, at in zip(sizes, places, strict=True)], axis=1))
        uses.append(np.broadcast_to(use, shape)[places])
        if not any(map(len, parts)):
            nearest.look(np.where(allowed, use, np.nan), sizes, shape)
    result.shapes, result.use = np.concatenate(parts), np.concatenate(uses)
    if not len(result.shapes):
        raise _nothing_fits(result, nearest, measured, limits, tolerance)
    return result


def _count(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> int:
    """True entries of a mask once it is broadcast."""
    return int(np.count_nonzero(mask)) * (prod(shape) // mask.size)


class _Nearest:
    """The largest shape within the budgets, and the one that exceeds them least."""

    def __init__(self) -> None:
        self.within: tuple[float, Sizes] | None = None
        self.above: tuple[float, Sizes] | None = None

    def look(self, use: NDArray[np.float64], sizes: Sequence[IntArray], shape: tuple[int, ...]) -> None:
        whole = np.broadcast_to(use, shape)
        for attribute, best, side in (("within", np.nanargmax, whole <= 1), ("above", np.nanargmin, whole > 1)):
            if not side.any():
                continue
            place = int(best(np.where(side, whole, np.nan)))
            at = np.unravel_index(place, shape)
            found = float(whole[at]), tuple(int(axis.ravel()[i]) for axis, i in zip(sizes, at, strict=True))
            before = getattr(self, attribute)
            if before is None or abs(found[0] - 1) < abs(before[0] - 1):
                setattr(self, attribute, found)


def _nothing_fits(
    result: Found, nearest: _Nearest, measured: Mapping[str, Measure], limits: Mapping[str, float], tolerance: float
) -> SearchError:
    candidates = result.total - result.ruled_out
    if nearest.within is None:
        binding = [name for name, count in result.above.items() if count == candidates]
        told = " and ".join(f"the budget {name} = {describe(name, limits[name])}" for name in binding)
        why = f"every shape is above {told}" if binding else "every shape is above one budget or another"
        assert nearest.above is not None
        _, sizes = nearest.above
        needs = {name: measured[name](sizes) for name in limits}
        asked = ", ".join(f"{name} {describe(name, need)}" for name, need in needs.items() if need > limits[name])
        remedy = f"the nearest is {_told(sizes)}; it needs {asked}; or allow smaller sizes in search.space"
    else:
        use, sizes = nearest.within
        why = f"no shape uses a budget to {1 - tolerance:.0%} without exceeding one"
        remedy = (
            f"the nearest within the budgets is {_told(sizes)}, at {use:.1%}: search.tolerance={1 - use + 5e-4:.3f} "
            "lets it pass; or allow smaller steps or larger sizes in search.space"
        )
    return SearchError(
        f"none of {candidates:,} shapes fits: {why}",
        rule="a shape is within every budget and uses one of them to at least 1 - search.tolerance",
        remedy=remedy,
    )


def _told(sizes: Sizes) -> str:
    return f"{short_name(sizes)} ({', '.join(f'{name} {size}' for name, size in named(sizes).items())})"


def ranges(space: Space) -> dict[str, str]:
    """The sizes of each axis for people."""
    names = (row.size for row in axes_of(space.teacher))
    return {name: _range(values) for name, values in zip(names, space.values, strict=True)}


def _range(values: tuple[int, ...]) -> str:
    if len(values) <= 4:
        return ", ".join(map(str, values))
    steps = {second - first for first, second in pairwise(values)}
    return f"{values[0]} to {values[-1]}" + (f" by {steps.pop()}" if len(steps) == 1 else f", {len(values)} sizes")
