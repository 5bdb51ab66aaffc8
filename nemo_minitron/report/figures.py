"""Figures of a report as SVG text. Each shows one thing, names its axes and units, and marks what was cut."""

import io
import re
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nemo_minitron.arch.axes import PrunableAxis
from nemo_minitron.callbacks.reporter import compact
from nemo_minitron.report.content import Importance, Row, Vector

COLOURS = {"teacher": "#475569", "pruned": "#c2410c", "distilled": "#0f766e", "tuned": "#7c3aed"}
KEPT, CUT, INK, MUTED, GRID = "#0f766e", "#e11d48", "#1e293b", "#64748b", "#e2e8f0"
WIDTH = 7.2
METRIC_UNITS = {
    "lm_loss": "rise of the loss\n(nats per token)",
    "logit_mse": "squared change of the\nlogits / their squares",
}
_MOST_CURVES = 7
_HEAT = LinearSegmentedColormap.from_list("importance", ["#f8fafc", "#99d5cc", "#0f766e", "#042f2e"])
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def layer_importance(importance: Importance) -> str:
    """Block Influence of every layer, dropped ones marked."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        values, dropped = importance.block_influence, set(importance.dropped_layers)
        colours = [CUT if layer in dropped else KEPT for layer in range(len(values))]
        axes.bar(np.arange(len(values)), values, color=colours, width=0.72)
        axes.set(xlabel="layer", ylabel="Block Influence (1 - cos)", xlim=(-0.8, len(values) - 0.2))
        _log_if_wide(axes, values)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        axes.grid(axis="x", visible=False)
        _legend_patches(axes, dropped)

    return svg(draw, height=2.7)


def leave_one_out(importance: Importance) -> str:
    """What the model loses without each single layer, a panel a metric, dropped layers marked."""
    depth = importance.depth
    assert depth is not None

    def draw(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(len(depth.layers), 1, sharex=True))
        dropped = set(importance.dropped_layers)
        for axes, (metric, values) in zip(panels, depth.layers.items(), strict=True):
            colours = [CUT if layer in dropped else KEPT for layer in range(len(values))]
            axes.bar(np.arange(len(values)), values, color=colours, width=0.72)
            axes.set(ylabel=METRIC_UNITS.get(metric, f"rise of {metric}"), xlim=(-0.8, len(values) - 0.2))
            _log_if_wide(axes, values)
            axes.grid(axis="x", visible=False)
        panels[-1].set_xlabel("layer left out")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        _legend_patches(panels[0], dropped)

    return svg(draw, height=0.7 + 2.0 * len(depth.layers))


def block_curve(importance: Importance, metric: str) -> str:
    """What the model loses without blocks of consecutive layers, a curve a length; a ring is the block to drop."""
    depth = importance.depth
    assert depth is not None
    curves = {1: depth.layers[metric], **depth.blocks[metric]}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lengths = _some_lengths(list(curves), len(importance.dropped_layers))
        for place, length in enumerate(lengths):
            values, shade = curves[length], _HEAT(0.25 + 0.6 * place / max(len(lengths) - 1, 1))
            marked = length == len(importance.dropped_layers)
            label = f"{length} layer{'s' if length > 1 else ''}" + (", as many as went" if marked else "")
            width = 2.6 if marked else 1.4
            axes.plot(values, color=CUT if marked else shade, linewidth=width, label=label)
            best = int(values.argmin())
            axes.plot([best], [values[best]], "o", color=INK, markerfacecolor="white", markersize=6, zorder=3)
        axes.set(xlabel="first layer left out", ylabel=METRIC_UNITS.get(metric, f"rise of {metric}"))
        _log_if_wide(axes, np.concatenate([curves[length] for length in lengths]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8, title="left out")

    return svg(draw, height=3.3)


def sorted_importance(importance: Importance, row: PrunableAxis) -> str:
    """Importance of each layer's units, sorted, against the layer's mean; and where it was cut."""
    layers = importance.units[row.axis]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = max(map(len, layers))
        picture = np.full((len(layers), width), np.nan)
        for layer, units in enumerate(layers):
            if not units.size:
                continue
            ordered = np.sort(units)[::-1] / max(float(units.mean()), np.finfo(float).tiny)
            picture[layer, : len(ordered)] = np.log10(np.maximum(ordered, 1e-3))
        image = axes.imshow(picture, aspect="auto", cmap=_HEAT, vmin=-1, vmax=1, interpolation="nearest")
        for layer, kept in importance.kept.items():
            if row.axis in kept:
                axes.plot([len(kept[row.axis]) - 0.5] * 2, [layer - 0.5, layer + 0.5], color=CUT, linewidth=1.4)
        for layer in importance.dropped_layers:
            axes.axhspan(layer - 0.5, layer + 0.5, facecolor="white", alpha=0.72, edgecolor="none")
        axes.set(xlabel=f"{row.units} of the layer, most important first", ylabel="layer")
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[-1, 0, 1])
        bar.ax.set_yticklabels(["x 0.1", "mean", "x 10"])
        bar.outline.set_visible(False)

    return svg(draw, height=3.1)


def hidden_importance(importance: Importance) -> str:
    """Sorted importance of the residual channels, kept and cut."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _sorted_curve(axes, importance.hidden, len(importance.kept_hidden))
        axes.set(xlabel="hidden channels, most important first", ylabel="importance")
        if importance.hidden.min() > 0:
            axes.set_yscale("log")

    return svg(draw, height=2.4)


def unit_importance(importance: Importance, row: PrunableAxis) -> str:
    """Importance of each unit against its layer's mean; crosses are units that went, pale columns layers."""
    layers = importance.units[row.axis]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = max(map(len, layers))
        picture = np.full((width, len(layers)), np.nan)
        for layer, units in enumerate(layers):
            if not units.size:
                continue
            picture[: len(units), layer] = units / max(float(units.mean()), np.finfo(float).tiny)
        image = axes.imshow(picture, aspect="auto", cmap=_HEAT, vmin=0, vmax=2, interpolation="nearest")
        for layer, kept in importance.kept.items():
            gone = [unit for unit in range(len(layers[layer])) if unit not in kept.get(row.axis, ())]
            axes.plot([layer] * len(gone), gone, linestyle="none", marker="x", color=CUT, markersize=4)
        for layer in importance.dropped_layers:
            axes.axvspan(layer - 0.5, layer + 0.5, facecolor="white", alpha=0.72, edgecolor="none")
        axes.set(xlabel="layer", ylabel=row.unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 1, 2])
        bar.ax.set_yticklabels(["0", "mean", "x 2"])
        bar.outline.set_visible(False)

    return svg(draw, height=1.2 + 0.13 * max(map(len, layers)))


def distillation(rows: list[Row]) -> str:
    """KL to the teacher in training and on held-out text, and held-out cross-entropy with the teacher's line."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _line(left, rows, "train/kl", colour="#94d3c9", label="training batches", marker="", width=1.0)
        _line(left, rows, "val/kl", colour=COLOURS["distilled"], label="held-out text")
        left.set(title="KL(teacher || student)", ylabel="nats per token", ylim=(0, None))
        _line(right, rows, "val/ce", colour=COLOURS["distilled"], label="student")
        teacher = [row["val/teacher_ce"] for row in rows if "val/teacher_ce" in row]
        if teacher:
            right.axhline(teacher[-1], color=COLOURS["teacher"], linestyle="--", linewidth=1.2, label="teacher")
        start = [row["val/ce"] for row in rows if "val/ce" in row and row["step"] == 0]
        if start:
            right.axhline(start[0], color=COLOURS["pruned"], linestyle=":", linewidth=1.2, label="pruned, undistilled")
        right.set(title="Held-out cross-entropy", ylabel="nats per token")
        for axes in (left, right):
            axes.set_xlabel("tokens trained on")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: compact(value)))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
            if axes.get_legend_handles_labels()[0]:
                # Below the axes: training curves leave no corner free.
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, fontsize=8, columnspacing=1.2)

    return svg(draw, height=3.2)


def stage_seconds(seconds: dict[str, float]) -> str:
    """Where the time went."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names, values = list(seconds), list(seconds.values())
        bars = axes.barh(names, values, color=KEPT, height=0.62)
        axes.bar_label(bars, labels=[f"{value:.1f} s" for value in values], padding=4, fontsize=8, color=MUTED)
        axes.invert_yaxis()
        axes.set(xlabel="seconds", xlim=(0, max(values) * 1.15 or 1))
        axes.grid(axis="y", visible=False)

    return svg(draw, height=0.75 + 0.24 * len(seconds))


def _line(
    axes: Axes, rows: list[Row], key: str, *, colour: str, label: str, marker: str = "o", width: float = 1.8
) -> None:
    points = [(row["tokens"], row[key]) for row in rows if key in row]
    if points:
        tokens, values = zip(*points, strict=True)
        axes.plot(tokens, values, color=colour, label=label, marker=marker, markersize=3.5, linewidth=width)


def _sorted_curve(axes: Axes, values: Vector, kept: int) -> None:
    ordered = np.sort(values)[::-1]
    positions = np.arange(len(ordered))
    axes.plot(positions[:kept], ordered[:kept], color=KEPT, linewidth=1.8, label=f"kept {kept}")
    if kept < len(ordered):
        cut = slice(max(kept - 1, 0), None)
        axes.plot(positions[cut], ordered[cut], color=CUT, linewidth=1.8, label=f"cut {len(ordered) - kept}")
    axes.legend(loc="upper right", fontsize=8)


def _some_lengths(lengths: list[int], wanted: int) -> list[int]:
    """A few block lengths that tell the story: doubling ones, and the wanted one."""
    doubling = [length for length in lengths if length & (length - 1) == 0]
    return sorted({*doubling[:_MOST_CURVES], *(length for length in lengths if length == wanted)})


def _log_if_wide(axes: Axes, values: Vector) -> None:
    if values.min() > 0 and values.max() / values.min() > 30:
        axes.set_yscale("log")


def _legend_patches(axes: Axes, dropped: Iterable[int]) -> None:
    axes.bar([0], [0], color=KEPT, label="kept")
    if any(True for _ in dropped):
        axes.bar([0], [0], color=CUT, label="dropped")
    axes.legend(loc="upper center", ncols=2, fontsize=8)


def svg(draw: Callable[[Figure], Any], *, height: float) -> str:
    """The figure as SVG text, the same bytes for the same data."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "nemo_minitron"}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
