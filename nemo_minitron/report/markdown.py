"""The report without its pictures, in Markdown: for the README of a run folder and for the model card."""

from collections.abc import Iterator, Sequence

from nemo_minitron.report import tables
from nemo_minitron.report.content import ReportContent, Row


def twin(content: ReportContent) -> Iterator[tuple[str, str]]:
    """Titles and bodies, in the page's order."""
    tiles = [(row["label"], row["value"]) for row in tables.headline(content)]
    yield "At a glance", markdown({"headings": ("of", "value"), "rows": tiles})
    gone = tables.dropped(content)
    note = f"\n\nDropped layers (the teacher's numbering from 0): {gone}." if gone else ""
    yield "Before and after", markdown(tables.architecture(content)) + note
    if (quality := tables.quality(content)) is not None:
        yield "Quality on held-out text", f"{markdown(quality)}\n\n{tables.quality_note(content)}"
    for section in tables.evaluated_sections(content):
        yield section["title"], f"{markdown(section['table'])}\n\n{section['note']}"
    if (curve := tables.curve(content)) is not None:
        note = f"Held-out text, in nats per token. Trained on {tables.objective(content)}."
        yield "Distillation", f"{markdown(curve)}\n\n{note}"
    if content.seconds:
        yield "Pipeline", markdown(tables.pipeline(content))
    if samples := tables.samples(content):
        yield (
            "The same beginning",
            "\n".join(f"- {row['name']}: {code(row['prompt'] + row['text'])}" for row in samples),
        )
    yield "How to get this again", _again(content)


def _again(content: ReportContent) -> str:
    lines = [f"    {line}" for line in tables.commands(content)]
    lines += ["", *(f"- {name}: {value}" for name, value in tables.provenance(content))]
    if (digests := tables.digests(content)) is not None:
        lines += ["", markdown(digests)]
    return "\n".join(lines).strip("\n")


def code(text: str) -> str:
    """Text of a model as code, in one line, that no backtick of its own ends."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def markdown(table: Row) -> str:
    """A table; the first column to the left, the others to the right."""
    headings: Sequence[str] = table["headings"]
    rule = "| --- " + "| ---: " * (len(headings) - 1) + "|"
    rows = [" | ".join(map(_cell, row)) for row in table["rows"]]
    return "\n".join([f"| {' | '.join(map(_cell, headings))} |", rule, *(f"| {row} |" for row in rows)])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
