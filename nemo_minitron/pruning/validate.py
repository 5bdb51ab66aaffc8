"""What is wrong with the indices of a plan, all of it."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from nemo_minitron.arch.axes import LAYER_AXES, Axis, PrunableAxis, outer_axis
from nemo_minitron.arch.layer import LayerSpec
from nemo_minitron.pruning.mixes import Mixes, problems_of


def index_problem(indices: Sequence[int], size: int) -> str:
    """What is wrong with the kept indices of an axis; "" for nothing."""
    if not indices:
        return "none are kept"
    if any(a >= b for a, b in pairwise(indices)):
        return "not ascending, or one index occurs twice"
    if indices[0] < 0 or indices[-1] >= size:
        return f"indices {indices[0]} to {indices[-1]} of {size}"
    return ""


def layer_problems(
    kept: Mapping[Axis, Sequence[int]], mixes: Mapping[Axis, Mixes], teacher: LayerSpec
) -> Iterator[str]:
    """What is wrong with what stays of one layer: one sentence a problem, none where all is sound.

    Args:
        kept: Indices by axis.
        mixes: Units that take on others, by axis.
        teacher: The layer.
    """
    rows = [row for row in LAYER_AXES if teacher.size(row)]
    if strange := sorted({*kept, *mixes} - {row.axis for row in rows}):
        yield f"the layer has no axis {', '.join(strange)}"
        return
    problems = [f"{r.plan}: {found}" for r in rows if (found := index_problem(kept.get(r.axis, ()), teacher.units(r)))]
    if not problems:
        for row in rows:
            merged = problems_of(mixes.get(row.axis, ()), kept=kept[row.axis], size=teacher.units(row))
            problems += [f"merged {row.plan}: {problem}" for problem in merged]
    if not problems:
        for row in rows:
            if (outer := outer_axis(row)) is not None:
                problems += _nesting_problems(row, outer, kept, teacher)
    yield from problems


def _nesting_problems(
    row: PrunableAxis, outer: PrunableAxis, kept: Mapping[Axis, Sequence[int]], teacher: LayerSpec
) -> Iterator[str]:
    """What is wrong with units that lie within others: of each of those that stay, equally many stay."""
    inside = teacher.units(row) // teacher.units(outer)
    counts = dict.fromkeys(kept[outer.axis], 0)
    for unit in kept[row.axis]:
        if unit // inside not in counts:
            yield f"{row.unit} {unit} stays, but its {outer.unit} {unit // inside} does not"
            return
        counts[unit // inside] += 1
    if empty := [unit for unit, count in counts.items() if not count]:
        yield f"{outer.unit} {empty[0]} stays without any of its {row.units}"
    elif len(set(counts.values())) > 1:
        yield f"{outer.units} keep unequal numbers of {row.units}: {counts}"
