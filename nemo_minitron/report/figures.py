"""Figures of a report. Each shows one thing, names its axes and units, marks what was cut, and says it in words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from nemo_minitron.arch.axes import PrunableAxis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count, weights
from nemo_minitron.report.content import Importance, Vector
from nemo_minitron.report.drawing import CUT, GRID, INK, KEPT, MUTED, PAPER, SERIES, Picture, legend, picture

METRIC_UNITS = {
    "lm_loss": "rise of the loss\n(nats per token)",
    "logit_mse": "squared change of the\nlogits / their squares",
}
_MAX_CURVES = 7
_HEAT = LinearSegmentedColormap.from_list("importance", ["#f8fafc", "#99d5cc", "#0f766e", "#042f2e"])


def architecture(teacher: ModelSpec, student: ModelSpec, sources: Sequence[int]) -> Picture:
    """Parameters of each of the teacher's layers, and what is left of them.

    Args:
        teacher: Before.
        student: After.
        sources: For each layer of the student, the teacher's layer that it was.
    """
    before, after = _layer_parameters(teacher), np.zeros(teacher.num_layers)
    after[list(sources)] = _layer_parameters(student)
    gone = [layer for layer in range(teacher.num_layers) if layer not in sources]
    other = [parameter_count(spec) - int(_layer_parameters(spec).sum()) for spec in (teacher, student)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = np.arange(teacher.num_layers)
        axes.bar(places, before / 1e6, color=GRID, edgecolor=MUTED, linewidth=0.6, width=0.8, label="teacher")
        axes.bar(places, after / 1e6, color=KEPT, width=0.8, label="left in the student")
        axes.set(xlabel="layer of the teacher", ylabel="parameters (millions)", xlim=(-0.8, len(places) - 0.2))
        _whole_numbers(axes)
        legend(figure, *axes.get_legend_handles_labels())

    alt = (
        f"Bars: parameters of the teacher's {teacher.num_layers} layers and what is left of each. The student has "
        f"{student.num_layers} layers; {_list('dropped', gone) or 'none was dropped'}. Outside the layers there are "
        f"{other[0]:,} parameters in the teacher and {other[1]:,} in the student."
    )
    return picture(draw, alt, height=2.6)


def _layer_parameters(spec: ModelSpec) -> Vector:
    counts = np.zeros(spec.num_layers)
    for weight in weights(spec):
        if weight.layer is not None:
            counts[weight.layer] += weight.numel
    return counts


def layer_importance(importance: Importance) -> Picture:
    """Block Influence of every layer, dropped ones marked."""
    values, dropped = importance.block_influence, importance.dropped_layers

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(np.arange(len(values)), values, color=_by_fate(importance), width=0.72)
        axes.set(xlabel="layer", ylabel="Block Influence (1 - cos)", xlim=(-0.8, len(values) - 0.2))
        _log_if_wide(axes, values)
        _whole_numbers(axes)
        _kept_and_dropped(figure, axes, dropped)

    order = np.argsort(values)
    alt = (
        f"Bars: Block Influence of {len(values)} layers. Lowest: layers {_some(order[:5])}; highest: layers "
        f"{_some(order[::-1][:3])}. {_list('Dropped', dropped)}"
    )
    return picture(draw, alt, height=2.9)


def leave_one_out(importance: Importance) -> Picture:
    """What the model loses without each single layer, a panel a metric, dropped layers marked."""
    depth = importance.depth
    assert depth is not None

    def draw(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(len(depth.layers), 1, sharex=True))
        for axes, (metric, values) in zip(panels, depth.layers.items(), strict=True):
            axes.bar(np.arange(len(values)), values, color=_by_fate(importance), width=0.72)
            axes.set(ylabel=METRIC_UNITS.get(metric, f"rise of {metric}"), xlim=(-0.8, len(values) - 0.2))
            _log_if_wide(axes, values)
            _whole_numbers(axes)
        panels[-1].set_xlabel("layer left out")
        _kept_and_dropped(figure, panels[0], importance.dropped_layers)

    told = "; ".join(
        f"{metric}: least without layers {_some(np.argsort(values)[:5])}" for metric, values in depth.layers.items()
    )
    alt = f"Bars: what is lost without each single layer. {told}. {_list('Dropped', importance.dropped_layers)}"
    return picture(draw, alt, height=0.9 + 2.0 * len(depth.layers))


def block_curve(importance: Importance, metric: str) -> Picture:
    """What the model loses without blocks of consecutive layers, a curve a length; a ring is the block to drop."""
    depth = importance.depth
    assert depth is not None
    curves = ({1: depth.layers[metric]} if metric in depth.layers else {}) | depth.blocks[metric]
    wanted = len(importance.dropped_layers)
    lengths = _some_lengths(list(curves), wanted)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, length in enumerate(lengths):
            values, is_marked = curves[length], length == wanted
            label = f"{length} layer{'s' if length > 1 else ''}" + (", as many as went" if is_marked else "")
            colour = CUT if is_marked else SERIES[place % len(SERIES)]
            axes.plot(values, color=colour, linewidth=2.6 if is_marked else 1.4, label=label)
            best = int(values.argmin())
            axes.plot([best], [values[best]], "o", color=INK, markerfacecolor=PAPER, markersize=6, zorder=3)
        axes.set(xlabel="first layer left out", ylabel=METRIC_UNITS.get(metric, f"rise of {metric}"))
        _log_if_wide(axes, np.concatenate([curves[length] for length in lengths]))
        _whole_numbers(axes)
        axes.grid(axis="x", visible=True)
        legend(figure, *axes.get_legend_handles_labels())

    told = ", ".join(
        f"{length} layer{'s' if length > 1 else ''} from {int(curves[length].argmin())} on" for length in lengths
    )
    alt = f"Curves: {metric} without blocks of consecutive layers, by the first of them. Least is lost without {told}."
    return picture(draw, alt, height=3.3, narrow_height=3.6)


def sorted_importance(importance: Importance, row: PrunableAxis) -> Picture:
    """Importance of each layer's units, sorted, against the layer's mean; and where it was cut."""
    layers = importance.units[row.axis]
    width = max(map(len, layers))
    values = np.full((len(layers), width), np.nan)
    for layer, units in enumerate(layers):
        if not units.size:
            continue
        ordered = np.sort(units)[::-1] / max(float(units.mean()), np.finfo(float).tiny)
        values[layer, : len(ordered)] = np.log10(np.maximum(ordered, 1e-3))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap=_HEAT, vmin=-1, vmax=1, interpolation="nearest")
        for layer, kept in importance.kept.items():
            if row.axis in kept:
                axes.plot([len(kept[row.axis]) - 0.5] * 2, [layer - 0.5, layer + 0.5], color=CUT, linewidth=1.4)
        for layer in importance.dropped_layers:
            axes.axhspan(layer - 0.5, layer + 0.5, facecolor=PAPER, alpha=0.72, edgecolor="none")
        axes.set(xlabel=f"{row.units} of the layer, most important first", ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[-1, 0, 1])
        bar.ax.set_yticklabels(["x 0.1", "mean", "x 10"])
        bar.outline.set_visible(False)

    alt = (
        f"Heat map: importance of the {row.units} of {len(layers)} layers, sorted, against each layer's mean. Of "
        f"{width} in a layer {_kept_range(importance, row)} stayed."
    )
    return picture(draw, alt, height=3.1)


def hidden_importance(importance: Importance) -> Picture:
    """Sorted importance of the residual channels, kept and cut."""
    values, kept = importance.hidden, len(importance.kept_hidden)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _sorted_curve(axes, values, kept)
        axes.set(xlabel="hidden channels, most important first", ylabel="importance")
        if values.min() > 0:
            axes.set_yscale("log")
        legend(figure, *axes.get_legend_handles_labels())

    spread = f", from {values.max():.3g} down to {values.min():.3g}"
    alt = f"Curve: importance of {len(values)} hidden channels, sorted{spread}. {kept} stayed."
    return picture(draw, alt, height=2.7)


def unit_importance(importance: Importance, row: PrunableAxis) -> Picture:
    """Importance of each unit against its layer's mean; crosses are units that went, pale columns layers."""
    layers = importance.units[row.axis]
    width = max(map(len, layers))
    values = np.full((width, len(layers)), np.nan)
    for layer, units in enumerate(layers):
        if not units.size:
            continue
        values[: len(units), layer] = units / max(float(units.mean()), np.finfo(float).tiny)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap=_HEAT, vmin=0, vmax=2, interpolation="nearest")
        for layer, kept in importance.kept.items():
            gone = [unit for unit in range(len(layers[layer])) if unit not in kept.get(row.axis, ())]
            axes.plot([layer] * len(gone), gone, linestyle="none", marker="x", color=CUT, markersize=4)
        for layer in importance.dropped_layers:
            axes.axvspan(layer - 0.5, layer + 0.5, facecolor=PAPER, alpha=0.72, edgecolor="none")
        axes.set(xlabel="layer", ylabel=row.unit)
        _whole_numbers(axes)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 1, 2])
        bar.ax.set_yticklabels(["0", "mean", "x 2"])
        bar.outline.set_visible(False)

    alt = (
        f"Heat map: importance of each {row.unit} of {len(layers)} layers against its layer's mean. Of {width} in a "
        f"layer {_kept_range(importance, row)} stayed."
    )
    return picture(draw, alt, height=1.2 + 0.13 * width)


def _kept_range(importance: Importance, row: PrunableAxis) -> str:
    counts = [len(kept[row.axis]) for kept in importance.kept.values() if row.axis in kept] or [0]
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _sorted_curve(axes: Axes, values: Vector, kept: int) -> None:
    ordered = np.sort(values)[::-1]
    positions = np.arange(len(ordered))
    axes.plot(positions[:kept], ordered[:kept], color=KEPT, linewidth=1.8, label=f"kept {kept}")
    if kept < len(ordered):
        cut = slice(max(kept - 1, 0), None)
        axes.plot(positions[cut], ordered[cut], color=CUT, linewidth=1.8, label=f"cut {len(ordered) - kept}")


def _some_lengths(lengths: list[int], wanted: int) -> list[int]:
    """A few block lengths that tell the story: doubling ones, and the wanted one."""
    doubling = [length for length in lengths if length & (length - 1) == 0]
    return sorted({*doubling[:_MAX_CURVES], *(length for length in lengths if length == wanted)})


def _log_if_wide(axes: Axes, values: Vector) -> None:
    if values.min() > 0 and values.max() / values.min() > 30:
        axes.set_yscale("log")


def _by_fate(importance: Importance) -> list[str]:
    dropped = set(importance.dropped_layers)
    return [CUT if layer in dropped else KEPT for layer in range(len(importance.block_influence))]


def _whole_numbers(axes: Axes) -> None:
    """Layers along the horizontal axis: whole numbers, and no grid between bars."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(axis="x", visible=False)


def _kept_and_dropped(figure: Figure, axes: Axes, dropped: Sequence[int]) -> None:
    axes.bar([0], [0], color=KEPT, label="kept")
    if dropped:
        axes.bar([0], [0], color=CUT, label="dropped")
    legend(figure, *axes.get_legend_handles_labels())


def _some(numbers: NDArray[np.integer[Any]]) -> str:
    return ", ".join(str(int(number)) for number in numbers)


def _list(what: str, layers: Sequence[int]) -> str:
    return f"{what}: {', '.join(map(str, layers))}" if layers else ""
