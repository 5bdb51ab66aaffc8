"""The picture of a search: what each candidate costs and how well it does, at every rung."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from nemo_minitron.report.drawing import MUTED, SERIES, Picture, is_narrow, legend, picture

_RUNGS = (MUTED, *SERIES)
_UNITS = {
    "params": ("parameters (millions)", 1e6),
    "active_params": ("active parameters (millions)", 1e6),
    "non_embedding_params": ("parameters without embeddings (millions)", 1e6),
    "weight_memory": ("weights (MB)", 1e6),
    "kv_cache": ("KV cache (MB)", 1e6),
    "ssm_state": ("Mamba states (MB)", 1e6),
    "memory": ("weights, KV cache and Mamba states (MB)", 1e6),
    "flops_per_token": ("GFLOPs per generated token", 1e9),
    "prefill_ms": ("prefill (ms)", 1.0),
    "decode_ms": ("decoding a token (ms)", 1.0),
}


def pareto(rows: Sequence[dict[str, Any]], cost: str, *, rungs: int) -> Picture:
    """Loss over cost, a panel for the pruned candidates and one for the trained ones, with each rung's front.

    Args:
        rows: `search.results.candidate_rows`.
        cost: Which measure is the horizontal axis.
        rungs: Number of rungs, the untrained one included.
    """
    label, unit = _UNITS[cost]

    def draw(figure: Figure) -> None:
        count = 2 if rungs > 1 else 1
        panels = figure.subplots(*((count, 1) if is_narrow(figure) else (1, count)), squeeze=False).flatten()
        entries: dict[str, Any] = {}
        for rung in range(rungs):
            axes = panels[min(rung, 1)]
            key = "loss_pruned" if rung == 0 else f"loss_rung{rung}"
            points = sorted((row[cost] / unit, row[key], row["label"]) for row in rows if key in row and cost in row)
            colour = _RUNGS[rung % len(_RUNGS)]
            name = "as pruned" if rung == 0 else f"after rung {rung}"
            places = [x for x, *_ in points], [y for _, y, _ in points]
            entries[name] = axes.scatter(*places, s=18, color=colour, zorder=3)
            front = pareto_front([(x, y) for x, y, _ in points])
            axes.plot(*zip(*front, strict=True), color=colour, linewidth=1.0, alpha=0.7, drawstyle="steps-post")
            for x, y, told in points:
                if told:
                    axes.annotate(told, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=MUTED)
        for axes in panels:
            axes.set(xlabel=label, ylabel="loss (nats per token)")
        legend(figure, entries.values(), entries)

    last = "loss_pruned" if rungs == 1 else f"loss_rung{rungs - 1}"
    best = min((row for row in rows if last in row), key=lambda row: float(row[last]), default=None)
    told = f" Best in the end: {best['name']} with {best[last]:.4f}." if best is not None else ""
    alt = f"Points: loss of {len(rows)} candidates over {label}, as pruned and after each rung.{told}"
    return picture(draw, alt, height=3.6, narrow_height=6.2)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates (less is better), by the first one."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front
