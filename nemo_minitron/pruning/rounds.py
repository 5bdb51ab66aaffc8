"""Pruning in several rounds: the sizes on the way from the teacher to the target.

Source: arXiv:2407.14679, section 2.2, iterative importance: of `T` rounds, round `i` prunes to
`d_s - i (d_s - d_t) / T`, where the teacher has `d_s` and the target asks for `d_t`. Each size is rounded, so that
every round is a model one could have asked for, and the last one is the target itself.
"""

from fractions import Fraction
from math import ceil, gcd

from nemo_minitron.arch.axes import LAYER_AXES, PRUNABLE, size_divisor
from nemo_minitron.arch.layer import COUNT_KEYS
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import PlanError
from nemo_minitron.pruning.sizes import student_spec


def round_targets(target: TargetConfig, teacher: ModelSpec, steps: int) -> tuple[TargetConfig, ...]:
    """What each round asks of the model that the round before has left; one round is the target as it is.

    Hidden and FFN sizes and KV groups are rounded to `target.multiple_of` or, without it, to the largest common divisor
    of both ends that is not above one round's share (halves go down), so that what divides both ends mostly divides the
    sizes between them too. Heads follow the groups: every group keeps equally many, and never more than before. Layers
    named in `target.drop_layers` go in the order in which they are named.

    Raises:
        PlanError: A size that cannot be, or a round that would cut nothing.
    """
    final = student_spec(target, teacher)
    if steps == 1:
        return (target,)
    if target.by_layer or not _uniform(teacher, final):
        raise PlanError(
            f"steps = {steps} for a model whose layers differ in size",
            rule="the sizes between two rounds are the same in every layer",
            remedy="prune in one step",
        )
    rounds = [_sizes(target, teacher, final, number, steps) for number in range(1, steps + 1)]
    for number, (before, after) in enumerate(zip([_whole(target, teacher), *rounds], rounds, strict=False), start=1):
        if before == after:
            raise PlanError(
                f"steps = {steps}: round {number} would cut nothing ({_told(after)})",
                rule="every round is smaller than the one before",
                remedy="take fewer steps, or a smaller target.multiple_of",
            )
    return tuple(
        target.model_copy(update={**_explicit(target, sizes), "drop_layers": dropped})
        for sizes, dropped in zip(rounds, _drops(target, rounds, teacher), strict=True)
    )


def round_specs(target: TargetConfig, teacher: ModelSpec, steps: int) -> tuple[ModelSpec, ...]:
    """The student's architecture after each round; the last one is the target's.

    Raises:
        PlanError: As `round_targets`.
    """
    specs: list[ModelSpec] = []
    for goal in round_targets(target, teacher, steps):
        specs.append(student_spec(goal, specs[-1] if specs else teacher))
    return tuple(specs)


Sizes = dict[str, int]


def _whole(target: TargetConfig, spec: ModelSpec) -> Sizes:
    """All sizes of a model, and the numbers of layers of kinds that the target names."""
    asked = {key: spec.kinds.get(kind, 0) for key, kind in COUNT_KEYS.items() if getattr(target, key) is not None}
    return {row.size: size for row in PRUNABLE if (size := spec.common_size(row))} | asked


def _uniform(*specs: ModelSpec) -> bool:
    """Whether all layers that have an axis have one size of it."""
    return all(len({layer.size(row) for layer in spec.layers} - {0}) <= 1 for spec in specs for row in LAYER_AXES)


def _sizes(target: TargetConfig, teacher: ModelSpec, final: ModelSpec, number: int, steps: int) -> Sizes:
    first, last = _whole(target, teacher), _whole(target, final)
    if number == steps:
        return last
    sizes: Sizes = {}
    for row in PRUNABLE:
        if row.size not in first:
            continue
        if (outer := size_divisor(row)) is None:
            step = getattr(target.multiple_of, row.size)
            sizes[row.size] = between(first[row.size], last[row.size], number, steps, multiple_of=step)
        else:
            many, few = (whole[row.size] // whole[outer.size] for whole in (first, last))
            sizes[row.size] = sizes[outer.size] * between(many, few, number, steps, unit=1)
    counts = (key for key in COUNT_KEYS if key in first)
    return sizes | {key: between(first[key], last[key], number, steps) for key in counts}


def between(first: int, last: int, number: int, steps: int, *, multiple_of: int = 1, unit: int | None = None) -> int:
    """The size after round `number` of `steps` on the way from `first` to `last`.

    Args:
        first: Size of the teacher.
        last: Size of the target.
        number: Which round, from 1.
        steps: Rounds in all.
        multiple_of: What the size must be a multiple of.
        unit: What it is rounded to; None chooses, as `round_targets` says.
    """
    if first == last or number == steps:
        return last
    unit = unit or _unit(first, last, steps)
    if unit % multiple_of:
        unit = multiple_of
    exact = first - Fraction(number * (first - last), steps)
    # The nearest multiple, and the smaller one of two that are equally near.
    rounded = ceil(exact / unit - Fraction(1, 2)) * unit
    return max(last, min(first // unit * unit, rounded))


def _unit(first: int, last: int, steps: int) -> int:
    common, share = gcd(first, last), max((first - last) // steps, 1)
    return next(common // part for part in range(1, common + 1) if common % part == 0 and common // part <= share)


def _explicit(target: TargetConfig, sizes: Sizes) -> dict[str, int | None]:
    """The sizes of the axes that the target names; layers that are named need no number."""
    named: dict[str, int | None] = {name: size for name, size in sizes.items() if getattr(target, name) is not None}
    return named | ({"num_layers": None} if target.drop_layers is not None else {})


def _drops(target: TargetConfig, rounds: list[Sizes], teacher: ModelSpec) -> list[tuple[int, ...] | None]:
    """The layers that each round drops, in the numbering of the model it finds."""
    if target.drop_layers is None:
        return [None] * len(rounds)
    waiting, present = list(target.drop_layers), list(range(teacher.num_layers))
    drops: list[tuple[int, ...] | None] = []
    for sizes in rounds:
        count = len(present) - sizes["num_layers"]
        going, waiting = waiting[:count], waiting[count:]
        drops.append(tuple(present.index(layer) for layer in going))
        present = [layer for layer in present if layer not in going]
    return drops


def _told(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
