"""The space of a search: the sizes of each axis, the rules they keep, and the shapes that stay within the budgets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise, product
from math import ceil, floor, lcm, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.sizes import fraction_of
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, mamba_split
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.sizes import AxisConfig, SpaceConfig, TargetConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.axes import (
    SearchAxis,
    Sizes,
    axes_of,
    layer_places,
    named,
    nested_places,
    place_of,
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
    least_layers: int = 1
    """Layers that a model has at least, all kinds together."""
    parallel: ParallelConfig
    """The layout that candidates are trained at."""
    rule: Callable[[Mapping[str, Any]], Any] | None = None
    """Which sizes, by their keys in a recipe, go together for a reason of their own; integers or arrays."""

    @cached_property
    def axes(self) -> tuple[SearchAxis, ...]:
        """The teacher's axes."""
        return axes_of(self.teacher)

    def named(self, sizes: Sequence[int]) -> dict[str, int]:
        """Sizes by their keys in a recipe."""
        return named(self.axes, sizes)

    def short_name(self, sizes: Sequence[int]) -> str:
        """As `L24-H512-F1408-A9-G3`."""
        return short_name(self.axes, sizes)

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
        counts = [len(values) for values in self.values]
        # One value of each axis before `split`, some of that one, and all of those behind it.
        split = next(place for place in range(len(counts)) if prod(counts[place + 1 :]) <= _CHUNK)
        rows = max(1, _CHUNK // prod(counts[split + 1 :]))
        for before in product(*self.values[:split]):
            for start in range(0, counts[split], rows):
                parts = [*((value,) for value in before), self.values[split][start : start + rows]]
                parts += self.values[split + 1 :]
                yield list(np.ix_(*(np.array(values, dtype=np.int64) for values in parts)))

    def allowed(self, sizes: Sequence[IntArray]) -> NDArray[np.bool_]:
        """Which shapes can be cut out of the teacher: heads a multiple of their groups, and layers enough for a stage.

        No group has more heads than the teacher's.
        """
        result: NDArray[np.bool_] = np.ones((1,) * len(self.values), dtype=np.bool_)
        for inner, outer in nested_places(self.axes):
            result = result & self.nests(sizes[inner], sizes[outer], inner, outer)
        numbers = layer_places(self.axes).values()
        if sum(self.values[place][0] for place in numbers) < self.least_layers:
            result = result & (sum(sizes[place] for place in numbers) >= self.least_layers)
        if self.rule is not None:
            result = result & self.rule({axis.key: size for axis, size in zip(self.axes, sizes, strict=True)})
        return result

    def nests(self, sizes: Any, outer_sizes: Any, inner: int, outer: int) -> NDArray[np.bool_]:
        """Whether sizes at place `inner` go with those at place `outer`, and with the layout."""
        teacher = sizes_of(self.teacher)
        most = teacher[inner] // teacher[outer]
        result: NDArray[np.bool_] = (sizes % outer_sizes == 0) & (sizes // outer_sizes <= most)
        if self.axes[inner].row.axis is Axis.MAMBA_HEAD:
            result = result & (sizes // outer_sizes % self._ranks_of_a_group(outer_sizes) == 0)
        return result

    def _ranks_of_a_group(self, groups: Any) -> IntArray:
        """Context-parallel ranks that share the heads of a Mamba group, for each number of groups."""
        tensor, context = self.parallel.tensor, self.parallel.context
        found = [mamba_split(count // tensor, context)[1] for count in np.ravel(groups).tolist()]
        return np.array(found, dtype=np.int64).reshape(np.shape(groups))


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


def make_space(
    search: SearchConfig,
    target: TargetConfig,
    teacher: ModelSpec,
    parallel: ParallelConfig,
    rule: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Space:
    """The space that a recipe asks for; see `Space.rule`.

    Raises:
        SearchError: Rules contradict each other; names all that do.
        SpecError: Layers of one kind differ.
    """
    axes = axes_of(teacher)
    problems = _unknown_keys(search, target, axes)
    values = []
    for axis, size in zip(axes, sizes_of(teacher), strict=True):
        found, wrong = _wanted_sizes(axis, size, search, target, parallel)
        problems += wrong
        values.append(found)
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if not problems:
        problems += _too_few(values, axes, teacher, chunks)
    if problems:
        raise SearchError(
            "search space: " + "; ".join(problems),
            rule="sizes of the teacher or less, multiples of the step, of target.multiple_of, and of the "
            "tensor-parallel sizes of the run and of the deployment",
            remedy="change search.space, target.multiple_of or parallel.tensor",
        )
    space = Space(teacher=teacher, values=tuple(values), least_layers=chunks, parallel=parallel, rule=rule)
    for inner, outer in nested_places(axes):
        sizes, outer_sizes = (np.array(values[place]) for place in (inner, outer))
        if not space.nests(sizes[:, None], outer_sizes, inner, outer).any():
            rows = axes[inner].row, axes[outer].row
            raise SearchError(
                f"search space: no number of {rows[0].units} in {list(values[inner])} goes with {rows[1].units} in "
                f"{list(values[outer])}",
                rule=f"{rows[0].units} are a multiple of {rows[1].units}, a group has no more {rows[0].units} than the "
                "teacher's, and context-parallel ranks that share Mamba groups have equally many of their heads",
                remedy=f"change search.space.{rows[0].size} or search.space.{rows[1].size}",
            )
    return space


def _unknown_keys(search: SearchConfig, target: TargetConfig, axes: Sequence[SearchAxis]) -> list[str]:
    """Sizes that the recipe names and the teacher does not have."""
    known = {axis.key for axis in axes}
    several = [axis.key for axis in axes if axis.is_layers and axis.kind]
    remedy = {"num_layers": f"its layers are of several kinds: {', '.join(several)}"} if several else {}
    return [
        f"{where}.{key}: {remedy.get(key, 'the teacher has no such size')}"
        for where, section in (("target", target), ("search.space", search.space))
        for key in SpaceConfig.model_fields
        if key not in known and getattr(section, key) is not None
    ]


def _wanted_sizes(
    axis: SearchAxis, size: int, search: SearchConfig, target: TargetConfig, parallel: ParallelConfig
) -> tuple[tuple[int, ...], list[str]]:
    """The sizes that a recipe allows on an axis of which the teacher has `size`, and what is wrong with them."""
    row = axis.row
    divisors = {"tensor": lcm(parallel.tensor, target.deployment.tensor_parallel), "expert": parallel.expert}
    asked = 1 if axis.kind else getattr(target.multiple_of, row.size)
    multiple = lcm(asked, divisors.get(row.divided_by, 1))
    wanted: AxisConfig | None = getattr(search.space, axis.key)
    exact: int | float | None = getattr(target, axis.key)
    if exact is not None and wanted is not None:
        return (), [f"target.{axis.key} = {exact} and search.space.{axis.key}: one of them"]
    if exact is not None:
        share = fraction_of(size, exact, step=multiple) if isinstance(exact, float) else exact
        wanted = AxisConfig(values=(share,))
    elif wanted is None and not row.is_searched:
        wanted = AxisConfig(values=(size,))
    return _sizes(axis, wanted or AxisConfig(), size, multiple)


def _too_few(values: list[tuple[int, ...]], axes: Sequence[SearchAxis], teacher: ModelSpec, chunks: int) -> list[str]:
    """Take out sizes that are too few whatever the others are; returns what is left without any."""
    problems = []
    numbers = layer_places(axes).values()
    most = {place: sum(values[other][-1] for other in numbers if other != place) for place in numbers}
    for place in numbers:
        values[place] = tuple(size for size in values[place] if size + most[place] >= chunks)
    if not all(values[place] for place in numbers):
        names = " + ".join(f"search.space.{axes[place].key}" for place in numbers)
        problems.append(f"{names} has fewer layers than parallel.pipeline needs ({chunks})")
    experts = place_of(axes, Axis.EXPERT)
    if experts is not None:
        top_k = max(layer.moe.top_k for layer in teacher.layers if layer.has_experts)
        values[experts] = tuple(size for size in values[experts] if size >= top_k)
        if not values[experts]:
            problems.append(f"search.space.num_experts has fewer experts than a token is routed to ({top_k})")
    return problems


def _sizes(axis: SearchAxis, wanted: AxisConfig, size: int, multiple: int) -> tuple[tuple[int, ...], list[str]]:
    """The sizes of one axis, and what is wrong with them."""
    where = f"search.space.{axis.key}"
    if wanted.values is not None:
        found = tuple(sorted(set(wanted.values)))
        wrong = [f"{where}: {value} is above the teacher's {size}" for value in found if value > size]
        wrong += [f"{where}: {value} is not a multiple of {multiple}" for value in found if value % multiple]
        return found, wrong
    step = lcm(wanted.step or lcm(step_of(axis.row, size), multiple), multiple)
    least = _share(0.5 if wanted.min is None else wanted.min, size, ceil)
    most = _share(size if wanted.max is None else wanted.max, size, floor)
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


def _share(value: int | float, size: int, rounded: Callable[[Fraction], int]) -> int:
    """A size, or a fraction of one by its decimal digits."""
    return rounded(Fraction(str(value)) * size) if isinstance(value, float) else value


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
    nearest = _Nearest(space)
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

    def __init__(self, space: Space) -> None:
        self.space = space
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

    def told(self, sizes: Sizes) -> str:
        """A shape for people."""
        sizes_named = ", ".join(f"{name} {size}" for name, size in self.space.named(sizes).items())
        return f"{self.space.short_name(sizes)} ({sizes_named})"


def _nothing_fits(
    result: Found, nearest: _Nearest, measured: Mapping[str, Measure], limits: Mapping[str, float], tolerance: float
) -> SearchError:
    candidates = result.total - result.ruled_out
    if not candidates:
        return SearchError(
            f"none of {result.total:,} combinations of sizes is one that a model can have",
            rule="sizes go together as the model, its layout and the configuration of an export to hf ask",
            remedy="allow more sizes in search.space, or set export.formats=[nemo] where hf is what cannot say them",
        )
    if nearest.within is None:
        binding = [name for name, count in result.above.items() if count == candidates]
        told = " and ".join(f"the budget {name} = {describe(name, limits[name])}" for name in binding)
        why = f"every shape is above {told}" if binding else "every shape is above one budget or another"
        assert nearest.above is not None
        _, sizes = nearest.above
        needs = {name: measured[name](sizes) for name in limits}
        asked = ", ".join(f"{name} {describe(name, need)}" for name, need in needs.items() if need > limits[name])
        remedy = f"the nearest is {nearest.told(sizes)}; it needs {asked}; or allow smaller sizes in search.space"
    else:
        use, sizes = nearest.within
        why = f"no shape uses a budget to {1 - tolerance:.0%} without exceeding one"
        remedy = (
            f"the nearest within the budgets is {nearest.told(sizes)}, at {use:.1%}: "
            f"search.tolerance={1 - use + 5e-4:.3f} lets it pass; or allow smaller steps or larger sizes in "
            "search.space"
        )
    return SearchError(
        f"none of {candidates:,} shapes fits: {why}",
        rule="a shape is within every budget and uses one of them to at least 1 - search.tolerance",
        remedy=remedy,
    )


def ranges(space: Space) -> dict[str, str]:
    """The sizes of each axis for people."""
    return {axis.key: _range(values) for axis, values in zip(space.axes, space.values, strict=True)}


def _range(values: tuple[int, ...]) -> str:
    if len(values) <= 4:
        return ", ".join(map(str, values))
    steps = {second - first for first, second in pairwise(values)}
    return f"{values[0]} to {values[-1]}" + (f" by {steps.pop()}" if len(steps) == 1 else f", {len(values)} sizes")
