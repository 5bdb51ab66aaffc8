"""Put a run's content into `report.html`, `summary.json` and `README.md`."""

import base64
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from nemo_minitron.arch.axes import LAYER_AXES, PrunableAxis
from nemo_minitron.arch.sizes import PARAMETERS, cut_sizes, named_sizes
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.callbacks.reporter import compact, duration
from nemo_minitron.report import figures, measured
from nemo_minitron.report.content import MODELS, Importance, ReportContent, Row
from nemo_minitron.report.pareto import pareto


def html(content: ReportContent) -> str:
    """The report as one file: style and pictures inside, nothing fetched when it is opened."""
    style = resources.files("nemo_minitron.report").joinpath("style.css").read_text(encoding="utf-8")
    return _render("report.html.j2", content, style=style, sections=_sections(content))


def readme(content: ReportContent) -> str:
    """A card for the run folder, in Markdown."""
    return _render("readme.md.j2", content, files=content.results.get("export", {}).get("files", {}))


def _render(template: str, content: ReportContent, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("nemo_minitron.report", ""),
        autoescape=select_autoescape(["html.j2"], default_for_string=False),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        content=content,
        subtitle=_subtitle(content),
        tiles=_tiles(content),
        architecture=_architecture(content),
        dropped=_dropped(content),
        quality=_quality(content),
        quality_note=_quality_note(content),
        evaluated=_evaluated(content),
        samples=_samples(content),
        provenance=_provenance(content),
        **more,
    )


def _subtitle(content: ReportContent) -> str:
    cut = 1 - content.parameters["student"] / content.parameters["teacher"]
    return f"{cut:.0%} fewer parameters than {content.source}, pruned and then distilled from it"


def _tiles(content: ReportContent) -> list[Row]:
    before, after = content.parameters["teacher"], content.parameters["student"]
    tiles = [{"value": f"{compact(before)} → {compact(after)}", "label": "parameters, teacher → student"}]
    perplexity = content.perplexity
    if {"teacher", "pruned", "distilled"} <= perplexity.keys():
        ratio = perplexity["distilled"] / perplexity["teacher"]
        change = f"{perplexity['teacher']:.1f} → {perplexity['distilled']:.1f}"
        tiles.append({"value": change, "label": f"held-out perplexity, {ratio:.2f} x the teacher"})
        tiles.append({"value": f"{perplexity['pruned']:,.0f}", "label": "perplexity before distillation"})
    if tokens := sum(row["tokens"] or 0 for row in content.rounds) or content.results.get("distill", {}).get("tokens"):
        tiles.append({"value": compact(tokens), "label": "tokens distilled on"})
    if content.seconds:
        tiles.append({"value": duration(sum(content.seconds.values())), "label": _where(content)})
    return tiles


def _where(content: ReportContent) -> str:
    hardware = content.manifest.get("hardware", {})
    gpus = hardware.get("gpus") or []
    return f"on {len(gpus)} x {gpus[0]}" if gpus else f"on {hardware.get('cores', '?')} CPU cores"


def _architecture(content: ReportContent) -> list[Row]:
    rows = []
    student = named_sizes(content.student)
    for label, before in named_sizes(content.teacher).items():
        after = student.get(label, 0)
        style = "strong" if label == PARAMETERS else ("same" if before == after else "")
        kept = f"{after / before:.1%}" if before else ""
        rows.append({"label": label, "style": style, "teacher": f"{before:,}", "student": f"{after:,}", "kept": kept})
    return rows


def _dropped(content: ReportContent) -> str:
    return ", ".join(map(str, content.importance.dropped_layers)) if content.importance else ""


def _quality(content: ReportContent) -> list[Row]:
    evaluated = content.results.get("evaluate", {})
    nats, errors = evaluated.get("nats", {}), evaluated.get("standard_error", {})
    bits = evaluated.get("bits_per_byte", {})
    rows = []
    for name, value in content.perplexity.items():
        count = content.parameters["teacher" if name == "teacher" else "student"]
        rows.append(
            {
                "name": name,
                "style": "strong" if name == "distilled" else "",
                "parameters": compact(count),
                "nats": f"{nats[name]:.4f}" if name in nats else "",
                "bits_per_byte": _with_error(bits[name]) if name in bits else "",
                "perplexity": f"{value:,.2f}" + (f" ± {errors[name]:.2f}" if errors.get(name) else ""),
                "ratio": f"{value / content.perplexity['teacher']:.2f} x" if "teacher" in content.perplexity else "",
            }
        )
    return rows


def _with_error(row: Row) -> str:
    error = "" if row.get("standard_error") is None else f" ± {row['standard_error']:.4f}"
    return f"{row['value']:.4f}{error}"


def _quality_note(content: ReportContent) -> str:
    evaluated = content.results.get("evaluate", {})
    counted = ", ".join(f"{evaluated[unit]:,} {unit}" for unit in ("tokens", "bytes") if evaluated.get(unit))
    documents = f"{evaluated['documents']:,} documents" if evaluated.get("documents") else "documents"
    return f"Measured on {counted + ' of ' if counted else ''}{documents} that nothing was trained or scored on."


def _samples(content: ReportContent) -> list[Row]:
    texts = content.results.get("evaluate", {}).get("samples", {})
    prompt = texts.get("prompt", "")
    found = []
    for name in MODELS:
        if name in texts:
            text = texts[name].removeprefix(prompt)
            found.append({"name": name, "colour": figures.COLOURS[name], "prompt": prompt, "text": text})
    return found


def _evaluated(content: ReportContent) -> list[Row]:
    """Sections of benchmark tasks and of speed, as far as they were measured."""
    evaluated = content.results.get("evaluate", {})
    sections: list[Row] = []
    if tasks := evaluated.get("tasks"):
        headings, rows = measured.task_table(tasks)
        note = "Score ± standard error, and the percentage of the teacher's score that is kept."
        table = {"headings": headings, "rows": rows}
        sections.append({"title": "Benchmark tasks", "figures": [], "table": table, "note": note})
    if speed := evaluated.get("speed"):
        headings, rows = measured.speed_table(speed)
        table = {"headings": headings, "rows": rows}
        sections.append({"title": "Speed", "figures": [], "table": table, "note": measured.speed_note(speed)})
    return sections


def _sections(content: ReportContent) -> list[Row]:
    sections: list[Row] = _evaluated(content)
    validated = [row for row in content.metrics if "val/kl" in row or "train/kl" in row]
    if validated:
        objective = content.results.get("distill", {}).get("objective", "forward KL over the full vocabulary")
        caption = f"Trained on {objective}. The dotted line is where the pruned model starts."
        curve = _figure("", caption, figures.distillation(content.metrics))
        sections.append({"title": "Distillation", "figures": [curve], "table": None})
    if training := _other_training(content):
        sections.append({"title": "Teacher correction and tuning", "figures": [], "table": training})
    if "search" in content.results:
        sections.append(_search(content.results["search"]))
    if (data := content.results.get("data", {}).get("sources")) is not None:
        sections.append({"title": "Data", "figures": [], "table": _data(data)})
    if len(content.rounds) > 1:
        sections.append({"title": "Round by round", "figures": [], "table": _rounds(content)})
    if content.importance is not None:
        sections.append({"title": "What matters in the teacher", "figures": _importance(content), "table": None})
    if content.seconds:
        figure = _figure("", "All attempts of a stage together.", figures.stage_seconds(content.seconds))
        sections.append({"title": "Time and memory", "figures": [figure], "table": _costs(content)})
    return sections


def _other_training(content: ReportContent) -> Row | None:
    """What the stages around distillation did to the model they trained, on what they validate on."""
    rows = []
    for name, model in (("correct", "teacher, on held-out text"), ("tune", "student, on held-out answers")):
        if (result := content.results.get(name)) is not None:
            first, last = result["history"][0]["ce"], result["validation"]["ce"]
            rows.append((name, model, f"{result['steps']:,}", compact(result["tokens"]), f"{first:.3f}", f"{last:.3f}"))
    headings = ("stage", "what", "steps", "tokens", "cross-entropy before", "after")
    return {"headings": headings, "rows": rows} if rows else None


def _search(result: Row) -> Row:
    """What was tried for the sizes, and how the candidates of the last rung did."""
    rows, rungs, cost = result["rows"], result["rungs"], result["budget"]
    last = f"loss_rung{rungs - 1}" if rungs > 1 else "loss_pruned"
    caption = (
        f"{len(rows)} candidates within the budget. A line joins those that no other beats in both coordinates. "
        "Losses are on calibration text."
    )
    headings = ("candidate", "", "parameters", "as pruned", "after the last rung")
    ranked = sorted((row for row in rows if last in row), key=lambda row: float(row[last]))
    table = [
        (row["name"], row["label"], compact(row["params"]), f"{row.get('loss_pruned', '')}"[:6], f"{row[last]:.4f}")
        for row in ranked
    ]
    figure = _figure("", caption, pareto(rows, cost, rungs=rungs))
    return {"title": "Search", "figures": [figure], "table": {"headings": headings, "rows": table}}


def _data(sources: Row) -> Row:
    """What was given, what was used of it, and why the rest was not."""
    rows = [
        (row["kind"], _files(row["files"]), f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['skipped']:,}")
        for row in sources["rows"]
    ]
    rows += [("skipped", row["reason"], "", "", f"{row['documents']:,}") for row in sources["skipped"]]
    rows += [("not used", row["reason"], _files(row["files"]), "", "") for row in sources["left_out"]]
    return {"headings": ("source", "", "documents", "tokens", "documents skipped"), "rows": rows}


def _rounds(content: ReportContent) -> Row:
    specs = [ModelSpec.from_dict(row["spec"]) for row in content.rounds]
    headings = ("after round", "parameters", *cut_sizes(specs[0]), "KL pruned", "KL distilled")
    rows = []
    for number, (row, spec) in enumerate(zip(content.rounds, specs, strict=True), start=1):
        kl = ("" if value is None else f"{value:.3f}" for value in row["kl"].values())
        rows.append(
            (
                str(number),
                compact(row["parameters"]),
                *(str(cut_sizes(spec).get(label, 0)) for label in cut_sizes(specs[0])),
                *kl,
            )
        )
    return {"headings": headings, "rows": rows}


def _importance(content: ReportContent) -> list[Row]:
    found = content.importance
    assert found is not None
    samples = next((row["samples"] for name, row in content.results.items() if name.startswith("score")), None)
    basis = f" From {samples:,} calibration samples." if samples else ""
    return [
        _figure(
            "Layers",
            "How much a layer turns the residual stream: a low bar is a layer that changes little." + basis,
            figures.layer_importance(found),
        ),
        *_depth(found),
        _figure("Hidden channels", "Summed over both norms of all layers.", figures.hidden_importance(found)),
        *(_unit_figure(found, row) for row in LAYER_AXES if row.axis in found.units),
    ]


def _unit_figure(found: Importance, row: PrunableAxis) -> Row:
    """What one axis of the layers shows: units that lie within others one by one, others sorted."""
    if row.within is None:
        caption = (
            f"A row is a layer, its {row.units} sorted. Left of the red mark they stayed; pale rows are dropped layers."
        )
        return _figure(row.units.capitalize(), caption, figures.sorted_importance(found, row))
    caption = (
        f"Importance of each {row.unit} against its layer's mean. Crosses were cut; pale columns are dropped layers."
    )
    return _figure(row.units.capitalize(), caption, figures.unit_importance(found, row))


def _depth(found: Importance) -> list[Row]:
    """What layers are worth when they are left out, if that was measured."""
    if found.depth is None:
        return []
    samples = f" From {found.depth.samples:,} calibration samples." if found.depth.samples else ""
    caption = "What the model loses without each layer, the others left as they are: a low bar is a layer it can spare."
    rows = [_figure("Layers left out one by one", caption + samples, figures.leave_one_out(found))]
    for metric, blocks in found.depth.blocks.items():
        if blocks:
            caption = (
                "A curve is a number of consecutive layers left out, by the first of them; the ring is its best block."
            )
            title = f"Layers left out in a row ({metric})"
            rows.append(_figure(title, caption, figures.block_curve(found, metric)))
    return rows


def _figure(title: str, caption: str, svg: str) -> Row:
    encoded = base64.b64encode(svg.encode()).decode()
    return {"title": title, "caption": caption, "uri": f"data:image/svg+xml;base64,{encoded}"}


def _costs(content: ReportContent) -> Row:
    rows = []
    for name, result in content.results.items():
        memory = f"{result['peak_memory_gb']:.2f} GB" if "peak_memory_gb" in result else ""
        speed = f"{compact(result['tokens_per_second'])} tokens/s" if result.get("tokens_per_second") else ""
        on_gpu = result.get("peak_gpu_memory_gb") or {}
        gpu_memory = f"{on_gpu['allocated']:.2f} of {on_gpu['reserved']:.2f} GB" if on_gpu else ""
        used = f"{result['mfu']:.1%}" if result.get("mfu") else ""
        rows.append((name, duration(result.get("seconds", 0.0)), memory, speed, gpu_memory, used))
    headings = ("stage", "time", "peak memory (rank 0)", "speed")
    if any(row[4] for row in rows):
        return {"headings": (*headings, "peak GPU memory (fullest rank), of reserved", "MFU"), "rows": rows}
    return {"headings": headings, "rows": [row[:4] for row in rows]}


def _provenance(content: ReportContent) -> list[tuple[str, str]]:
    manifest = content.manifest
    hardware = manifest.get("hardware", {})
    machine = f"{hardware.get('processor')}, {hardware.get('cores')} cores, {hardware.get('memory_gb')} GB memory"
    gpus = hardware.get("gpus") or []
    found = [
        ("seed", str(manifest.get("seed"))),
        ("commit", str(manifest.get("git") or "not run from a git checkout")),
        ("machine", machine + (f", {', '.join(gpus)}" if gpus else ", no GPU")),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())),
    ]
    commands = manifest.get("commands", [])
    return [*found, ("started", str(commands[0]["start"]))] if commands else found


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"
