"""Curves of distillations: one run with the lines it is to be measured by, or several runs over one another."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nemo_minitron.callbacks.reporter import compact
from nemo_minitron.report.content import Row
from nemo_minitron.report.drawing import COLOURS, MUTED, NOISY, SERIES, Picture, is_narrow, legend, picture

_DASHES = ("-", "--", ":", "-.")


def untrained_loss(vocab_size: int) -> float:
    """Cross-entropy in nats per token of a model that knows nothing and finds every token equally likely: `ln(vocab)`.

    One with random weights begins there or, as its logits are not all equal, a little above.
    """
    return math.log(vocab_size)


def distillation(rows: Sequence[Row], vocab_size: int) -> Picture:
    """KL to the teacher in training and on held-out text; held-out cross-entropy between the lines that bound it.

    Args:
        rows: Of `metrics.jsonl`.
        vocab_size: Gives the line of a model that was never trained.
    """
    teacher, pruned = lines(rows)

    def draw(figure: Figure) -> None:
        rows_columns = (2, 1) if is_narrow(figure) else (1, 2)
        first, second = figure.subfigures(*rows_columns, squeeze=False).flatten()
        left = first.subplots()
        _line(left, rows, "train/kl", colour=NOISY, label="training batches", marker="", width=0.9)
        _line(left, rows, "val/kl", colour=COLOURS["distilled"], label="held-out text")
        left.set(title="KL(teacher || student)", ylabel="nats per token", ylim=(0, None))
        # The line of an untrained model is far above: it has a piece of axis of its own.
        above, right = second.subplots(2, 1, sharex=True, height_ratios=[1, 6])
        _line(right, rows, "val/ce", colour=COLOURS["distilled"], label="student")
        level = untrained_loss(vocab_size)
        if teacher is not None:
            right.axhline(teacher, color=COLOURS["teacher"], linestyle="--", linewidth=1.2, label="teacher")
        if pruned is not None:
            right.axhline(pruned, color=COLOURS["pruned"], linestyle=":", linewidth=1.6, label="pruned only")
        random = f"random init, ln({vocab_size:,})"
        right.plot([], [], color=MUTED, linestyle="-.", linewidth=1.2, label=random)
        above.axhline(level, color=MUTED, linestyle="-.", linewidth=1.2)
        above.set(title="Held-out cross-entropy", ylim=(level - 0.5, level + 0.5), yticks=[round(level, 1)])
        above.spines["bottom"].set_visible(False)
        above.tick_params(bottom=False)
        right.set(ylabel="nats per token")
        for axes, place in ((left, first), (right, second)):
            tokens_along(axes)
            legend(place, *axes.get_legend_handles_labels())

    return picture(draw, _told(rows, teacher, pruned, vocab_size), height=3.5, narrow_height=6.4)


def lines(rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """Held-out cross-entropy of the teacher and of the pruned student before training, where they were measured."""
    teacher = [float(row["val/teacher_ce"]) for row in rows if "val/teacher_ce" in row]
    pruned = [float(row["val/ce"]) for row in rows if "val/ce" in row and row["step"] == 0]
    return (teacher[-1] if teacher else None), (pruned[0] if pruned else None)


def _told(rows: Sequence[Row], teacher: float | None, pruned: float | None, vocab_size: int) -> str:
    parts = []
    for key, what in (("val/kl", "KL to the teacher"), ("val/ce", "cross-entropy")):
        values = [row[key] for row in rows if key in row]
        if values:
            parts.append(f"held-out {what} from {values[0]:.3f} to {values[-1]:.3f}")
    fixed = {"the teacher's": teacher, "only pruned": pruned, "untrained": untrained_loss(vocab_size)}
    levels = ", ".join(f"{name} {value:.3f}" for name, value in fixed.items() if value is not None)
    return f"Curves over tokens trained on, in nats per token: {'; '.join(parts)}. Lines of cross-entropy: {levels}."


def overlaid(runs: Mapping[str, Sequence[Row]]) -> Picture:
    """Held-out KL and cross-entropy of several runs over the tokens they were trained on."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(2, 1) if is_narrow(figure) else figure.subplots(1, 2)
        for place, (name, rows) in enumerate(runs.items()):
            for axes, key in ((left, "val/kl"), (right, "val/ce")):
                points = [(row["tokens"], row[key]) for row in rows if key in row]
                style = {"color": SERIES[place % len(SERIES)], "linestyle": _DASHES[place // len(SERIES) % 4]}
                tokens, values = zip(*points, strict=True) if points else ((), ())
                axes.plot(tokens, values, label=name, marker="o", markersize=3.5, linewidth=1.6, **style)
        left.set(title="KL(teacher || student)", ylabel="nats per token")
        right.set(title="Held-out cross-entropy", ylabel="nats per token")
        for axes in (left, right):
            tokens_along(axes)
        legend(figure, *left.get_legend_handles_labels())

    told = []
    for name, rows in runs.items():
        values = [row["val/ce"] for row in rows if "val/ce" in row]
        if values:
            told.append(f"{name} from {values[0]:.3f} to {values[-1]:.3f}")
    alt = f"Curves over tokens trained on; held-out cross-entropy in nats per token: {'; '.join(told)}."
    return picture(draw, alt, height=3.5, narrow_height=6.0)


def tokens_along(axes: Axes) -> None:
    """Tokens trained on along the horizontal axis."""
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: compact(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def _line(
    axes: Axes, rows: Sequence[Row], key: str, *, colour: str, label: str, marker: str = "o", width: float = 1.8
) -> None:
    points = [(row["tokens"], row[key]) for row in rows if key in row]
    if points:
        tokens, values = zip(*points, strict=True)
        axes.plot(tokens, values, color=colour, label=label, marker=marker, markersize=3.5, linewidth=width)
