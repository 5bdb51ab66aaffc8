"""What two plans for one teacher decide differently, as data and as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_minitron.arch.axes import LAYER_AXES, MODEL_AXES, PRUNABLE
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan
from nemo_minitron.pruning.ranges import to_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisDiff:
    """One axis (of one layer of the teacher, or of the complete model) in two plans. Indices are the teacher's."""

    axis: str
    layer: int | None
    kept: tuple[int, int]
    """How many units each plan keeps."""
    only_first: tuple[int, ...]
    """Units that only the first plan keeps, ascending."""
    only_second: tuple[int, ...]

    @property
    def differing(self) -> int:
        """How many units only one of the plans keeps."""
        return len(self.only_first) + len(self.only_second)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanDiff:
    """Two plans side by side: every axis, in the order layers, hidden, then layer by layer those that both keep."""

    axes: tuple[AxisDiff, ...]
    settings: tuple[str, ...]
    """What else differs: rescaled norms, and layers whose merged heads do."""

    @property
    def same(self) -> bool:
        """Whether both decide the same (their provenance has no say)."""
        return not self.settings and not any(axis.differing for axis in self.axes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, indices as ranges."""
        rows = [
            asdict(axis)
            | {"only_first": to_ranges(axis.only_first), "only_second": to_ranges(axis.only_second)}
            | {"kept": list(axis.kept), "differing": axis.differing}
            for axis in self.axes
        ]
        return {"same": self.same, "settings": list(self.settings), "axes": rows}

    def table(self, *, width: int = 48) -> str:
        """Plain text: totals of each axis, then every place that differs and which units.

        Args:
            width: Longest list of units shown.
        """
        if self.same:
            return "the same decision"
        rows = [("axis", "first keeps", "second keeps", "differing", "of")]
        for row in PRUNABLE:
            found = [axis for axis in self.axes if axis.axis == row.plan]
            if not found:
                continue
            first, second = (sum(axis.kept[side] for axis in found) for side in (0, 1))
            differing = sum(axis.differing for axis in found)
            rows.append((row.plan, f"{first:,}", f"{second:,}", f"{differing:,}", f"{first + second:,}"))
        lines = _aligned(rows)
        for axis in self.axes:
            if axis.differing:
                where = axis.axis if axis.layer is None else f"layer {axis.layer} {axis.axis}"
                sides = (("-", axis.only_first), ("+", axis.only_second))
                shown = "  ".join(f"{sign} {_shortened(to_ranges(units), width)}" for sign, units in sides if units)
                lines.append(f"{where}: {shown}")
        return "\n".join([*lines, *self.settings])


def diff_plans(first: PruningPlan, second: PruningPlan) -> PlanDiff:
    """Compare two plans for one teacher.

    Layers that only one of them keeps are listed as such, and no further.

    Raises:
        PlanError: They are for different models.
    """
    second.check_fits(first.spec, where="second plan")
    layers = [{layer.source: layer for layer in plan.layers} for plan in (first, second)]
    shared = [(layers[0][source], layers[1][source]) for source in layers[0] if source in layers[1]]
    axes = [_axis(row.plan, None, first.kept(row), second.kept(row)) for row in MODEL_AXES]
    for one, other in shared:
        axes += [
            _axis(row.plan, one.source, one.kept.get(row.axis, ()), other.kept.get(row.axis, ()))
            for row in LAYER_AXES
            if row.axis in one.kept or row.axis in other.kept
        ]
    return PlanDiff(axes=tuple(axes), settings=tuple(_settings(first, second, shared)))


def _axis(name: str, layer: int | None, first: tuple[int, ...], second: tuple[int, ...]) -> AxisDiff:
    return AxisDiff(
        axis=name,
        layer=layer,
        kept=(len(first), len(second)),
        only_first=tuple(sorted(set(first) - set(second))),
        only_second=tuple(sorted(set(second) - set(first))),
    )


def _settings(first: PruningPlan, second: PruningPlan, shared: list[tuple[LayerPlan, LayerPlan]]) -> Iterator[str]:
    if first.norm_ratio != second.norm_ratio:
        ratios = " and ".join(f"{float(plan.norm_ratio):.4g}" for plan in (first, second))
        yield f"norms are scaled for {ratios} times fewer channels"
    differing = [one.source for one, other in shared if one.mixes != other.mixes]
    if differing:
        yield f"merged heads differ in layers {to_ranges(differing)}"
    routed = [one.source for one, other in shared if _top_k(first, one) != _top_k(second, other)]
    if routed:
        yield f"experts a token differ in layers {to_ranges(routed)}"
    scaled = [one.source for one, other in shared if first.group_ratio(one) != second.group_ratio(other)]
    if scaled:
        yield f"scales of Mamba's norms differ in layers {to_ranges(scaled)}"


def _top_k(plan: PruningPlan, layer: LayerPlan) -> int | None:
    teacher = plan.spec.layers[layer.source]
    return layer.top_k or (teacher.moe.top_k if teacher.has_experts else None)


def _shortened(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    cut = text[:width].rpartition(",")[0]
    return f"{cut},... ({text.count(',') - cut.count(',')} more)"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]
