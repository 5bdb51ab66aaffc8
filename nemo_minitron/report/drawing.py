"""Pictures of a report: each drawn for a wide page and for a phone, in colours that follow the page's theme."""

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.figure import Figure, SubFigure

KEPT, CUT, INK, MUTED, GRID, PAPER = "#0f766e", "#e11d48", "#1e293b", "#64748b", "#e2e8f0", "#ffffff"
COLOURS = {"teacher": "#475569", "pruned": "#c2410c", "distilled": "#0f766e", "tuned": "#7c3aed"}
NOISY = "#4a9d90"
"""What jumps from batch to batch."""
SERIES = ("#0f766e", "#c2410c", "#7c3aed", "#0369a1", "#a16207", "#be185d", "#4d7c0f")
"""Runs, rungs and block lengths, one after the other. With `MUTED` at least 3:1 against the page."""
DARK = {
    KEPT: "#2dd4bf",
    CUT: "#fb7185",
    INK: "#e2e8f0",
    MUTED: "#94a3b8",
    GRID: "#334155",
    PAPER: "#0f172a",
    NOISY: "#22938a",
    "#475569": "#cbd5e1",
    "#c2410c": "#fb923c",
    "#7c3aed": "#a78bfa",
    "#0369a1": "#38bdf8",
    "#a16207": "#facc15",
    "#be185d": "#f472b6",
    "#4d7c0f": "#a3e635",
}
"""Each colour of a figure on a dark page."""
WIDE, NARROW = 7.2, 4.0
"""Inches. A phone shows 4 inches over its width, so that 9 points stay 9 points."""
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


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure.

    Attributes:
        wide: SVG text for a page of more than 34 em.
        narrow: The same for a phone.
        alt: What it shows, in words and numbers, for those who do not see it.
    """

    wide: str
    narrow: str
    alt: str


def picture(draw: Callable[[Figure], Any], alt: str, *, height: float, narrow_height: float | None = None) -> Picture:
    """Draw a figure twice.

    Args:
        draw: Fills a figure; `is_narrow` says which of the two it is given.
        alt: What it shows.
        height: Of the wide one, in inches.
        narrow_height: Of the narrow one; None: the same.
    """
    narrow = svg(draw, width=NARROW, height=height if narrow_height is None else narrow_height)
    return Picture(svg(draw, width=WIDE, height=height), narrow, alt)


def is_narrow(figure: Figure) -> bool:
    """Whether a figure is the one for a phone."""
    return bool(figure.get_figwidth() < WIDE)


def legend(figure: Figure | SubFigure, handles: Iterable[Artist], labels: Iterable[str]) -> None:
    """A legend below everything, where it covers no line and no bar. Without entries there is none.

    Args:
        figure: A figure or a part of one.
        handles: What is named.
        labels: The names.
    """
    shown, named = list(handles), list(labels)
    most = 2 if figure.bbox.width < WIDE * figure.dpi else 4
    if shown:
        columns = min(len(shown), most)
        figure.legend(shown, named, loc="outside lower center", ncols=columns, fontsize=8, columnspacing=1.2)


def svg(draw: Callable[[Figure], Any], *, width: float = WIDE, height: float) -> str:
    """A figure as SVG text, the same bytes for the same data."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "nemo_minitron"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)


def themed(text: str) -> str:
    """An SVG whose colours are light or dark as the reader's system is."""
    light = "".join(f"--c{colour[1:]}:{colour};" for colour in DARK)
    dark = "".join(f"--c{colour[1:]}:{other};" for colour, other in DARK.items())
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    known = "|".join(colour[1:] for colour in DARK)
    coloured = re.sub(rf"(fill|stroke): #({known})\b", r"\1: var(--c\2)", text)
    return re.sub(r"(<svg\b[^>]*>)", rf"\1{style}", coloured, count=1)
