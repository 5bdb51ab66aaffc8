"""Put a run's content into `report.html`, `summary.json` and `README.md`."""

import base64
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from nemo_minitron.arch.axes import LAYER_AXES, PrunableAxis
from nemo_minitron.callbacks.reporter import compact, duration
from nemo_minitron.report import curves, figures, markdown, tables
from nemo_minitron.report.content import Importance, ReportContent, Row
from nemo_minitron.report.drawing import Picture, themed
from nemo_minitron.report.pareto import pareto


def html(content: ReportContent) -> str:
    """The report as one file: style and pictures inside, nothing fetched when it is opened."""
    return render(
        "report.html.j2",
        content=content,
        style=style(),
        subtitle=tables.subtitle(content),
        tiles=tables.headline(content),
        stages=_stages(content),
        sections=_sections(content),
        samples=tables.samples(content),
        provenance=tables.provenance(content),
        commands=tables.commands(content),
        digests=tables.digests(content),
    )


def readme(content: ReportContent) -> str:
    """A card for the run folder, in Markdown: the same tables, no pictures."""
    files = content.results.get("export", {}).get("files", {})
    return render(
        "readme.md.j2",
        content=content,
        subtitle=tables.subtitle(content),
        files=files,
        twin=list(markdown.twin(content)),
    )


def style() -> str:
    """The style sheet of every page."""
    return resources.files("nemo_minitron.report").joinpath("style.css").read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Fill a template; HTML is escaped."""
    environment = Environment(
        loader=PackageLoader("nemo_minitron.report", ""),
        autoescape=select_autoescape(["html.j2"], default_for_string=False),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def section(
    title: str, pictures: list[Row] | None = None, table: Row | None = None, note: str = "", *, folded: str = ""
) -> Row:
    """A part of a page: a heading, pictures, a table, a note. `folded` is what the reader opens to see the table."""
    return {"title": title, "figures": pictures or [], "table": table, "note": note, "folded": folded}


def figure(title: str, caption: str, drawn: Picture) -> Row:
    """A picture with its heading and caption, as the templates take it."""
    uris = {name: _uri(text) for name, text in (("wide", drawn.wide), ("narrow", drawn.narrow))}
    return {"title": title, "caption": caption, "alt": drawn.alt, **uris}


def _uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(themed(svg).encode()).decode()}"


def _stages(content: ReportContent) -> list[Row]:
    """The pipeline as steps: name, time, what came of it."""
    return [
        {"name": name, "time": duration(result["seconds"]), "summary": str(result.get("summary", ""))}
        for name, result in content.results.items()
        if "seconds" in result
    ]


def _sections(content: ReportContent) -> list[Row]:
    sections: list[Row] = [_before_and_after(content)]
    if (quality := tables.quality(content)) is not None:
        sections.append(section("Quality on held-out text", table=quality, note=tables.quality_note(content)))
    sections += [section(part["title"], [], part["table"], part["note"]) for part in tables.evaluated_sections(content)]
    if (points := tables.curve(content)) is not None or any("train/kl" in row for row in content.metrics):
        caption = (
            f"Trained on {tables.objective(content)}. Dashed: the teacher. Dotted: the student as it was pruned. "
            "Dash-dotted, on a piece of axis of its own: ln(vocabulary), a model that was never trained."
        )
        drawn = figure("", caption, curves.distillation(content.metrics, content.teacher.vocab_size))
        sections.append(section("Distillation", [drawn], points, folded="The held-out values as a table"))
    if training := tables.other_training(content):
        sections.append(section("Teacher correction and tuning", table=training))
    if "search" in content.results:
        sections.append(_search(content.results["search"]))
    if (data := content.results.get("data", {}).get("sources")) is not None:
        sections.append(section("Data", table=tables.data(data)))
    if len(content.rounds) > 1:
        sections.append(section("Round by round", table=tables.rounds(content)))
    if content.importance is not None:
        sections.append(section("What matters in the teacher", _importance(content)))
    if content.seconds:
        kind = "of a GPU each rank held" if tables.on_gpus(content) else "of every core of the machine"
        note = f"Time is that of all attempts of a stage together; cost is it in hours {kind}."
        sections.append(section("Time, cost and memory", table=tables.pipeline(content), note=note))
    return sections


def _before_and_after(content: ReportContent) -> Row:
    gone = tables.dropped(content)
    note = f"Dropped layers (the teacher's numbering from 0): {gone}." if gone else ""
    pictures = []
    if content.importance is not None:
        drawn = figures.architecture(content.teacher, content.student, sorted(content.importance.kept))
        pictures = [figure("", "Parameters of each layer, and what is left of them.", drawn)]
    return section("Before and after", pictures, tables.architecture(content), note)


def _search(result: Row) -> Row:
    """What was tried for the sizes, and how the candidates of the last rung did."""
    rows, rungs, cost = result["rows"], result["rungs"], result["budget"]
    last = f"loss_rung{rungs - 1}" if rungs > 1 else "loss_pruned"
    caption = (
        f"{len(rows)} candidates within the budget. A line joins those that no other beats in both coordinates. "
        "Losses are on calibration text."
    )
    headings = ("candidate", "why", "parameters", "as pruned", "after the last rung")
    ranked = sorted((row for row in rows if last in row), key=lambda row: float(row[last]))
    table = [
        (row["name"], row["label"], compact(row["params"]), f"{row.get('loss_pruned', '')}"[:6], f"{row[last]:.4f}")
        for row in ranked
    ]
    drawn = figure("", caption, pareto(rows, cost, rungs=rungs))
    return section("Search", [drawn], {"headings": headings, "rows": table})


def _importance(content: ReportContent) -> list[Row]:
    found = content.importance
    assert found is not None
    samples = next((row["samples"] for name, row in content.results.items() if name.startswith("score")), None)
    basis = f" From {samples:,} calibration samples." if samples else ""
    return [
        figure(
            "Layers",
            "How much a layer turns the residual stream: a low bar is a layer that changes little." + basis,
            figures.layer_importance(found),
        ),
        *_depth(found),
        figure("Hidden channels", "Summed over both norms of all layers.", figures.hidden_importance(found)),
        *(_unit_figure(found, row) for row in LAYER_AXES if row.axis in found.units),
    ]


def _unit_figure(found: Importance, row: PrunableAxis) -> Row:
    """What one axis of the layers shows: units that lie within others one by one, others sorted."""
    if row.within is None:
        caption = (
            f"A row is a layer, its {row.units} sorted. Left of the red mark they stayed; pale rows are dropped layers."
        )
        return figure(row.units.capitalize(), caption, figures.sorted_importance(found, row))
    caption = (
        f"Importance of each {row.unit} against its layer's mean. Crosses were cut; pale columns are dropped layers."
    )
    return figure(row.units.capitalize(), caption, figures.unit_importance(found, row))


def _depth(found: Importance) -> list[Row]:
    """What layers are worth when they are left out, if that was measured."""
    if found.depth is None:
        return []
    samples = f" From {found.depth.samples:,} calibration samples." if found.depth.samples else ""
    caption = "What the model loses without each layer, the others left as they are: a low bar is a layer it can spare."
    rows = []
    if found.depth.layers:
        rows.append(figure("Layers left out one by one", caption + samples, figures.leave_one_out(found)))
    for metric, blocks in found.depth.blocks.items():
        if blocks:
            caption = (
                "A curve is a number of consecutive layers left out, by the first of them; the ring is its best block."
            )
            title = f"Layers left out in a row ({metric})"
            rows.append(figure(title, caption, figures.block_curve(found, metric)))
    return rows
