"""What a run came to as tables: the page, the run folder's README and the model card show the same ones.

A table is a dict of `headings`, `rows` of texts, and, where rows differ in weight, `styles`: a class a row.
"""

from nemo_minitron.arch.sizes import PARAMETERS, cut_sizes, named_sizes
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import matrix_count
from nemo_minitron.callbacks.reporter import compact, duration
from nemo_minitron.report import measured
from nemo_minitron.report.content import MODELS, ReportContent, Row
from nemo_minitron.report.curves import lines, untrained_loss

BF16_BYTES = 2
_MAX_POINTS = 12


# -- the headline ----------------------------------------------------------------------------------------------------


def subtitle(content: ReportContent) -> str:
    """The run in half a sentence."""
    cut = 1 - content.parameters["student"] / content.parameters["teacher"]
    made = "pruned and then distilled from it" if "distill" in content.results else "pruned from it"
    return f"{cut:.0%} fewer parameters than {content.source}, {made}"


def headline(content: ReportContent) -> list[Row]:
    """A `value` and its `label` for each thing that people ask first, as far as it was measured."""
    before, after = content.parameters["teacher"], content.parameters["student"]
    tiles = [
        tile(f"{compact(before)} → {compact(after)}", f"parameters, {after / before:.0%} of the teacher's"),
        tile(f"{size(BF16_BYTES * before)} → {size(BF16_BYTES * after)}", "memory of the weights in bf16"),
        _speed(content),
    ]
    perplexity = content.perplexity
    if {"teacher", "pruned", "distilled"} <= perplexity.keys():
        ratio = perplexity["distilled"] / perplexity["teacher"]
        change = f"{perplexity['teacher']:.1f} → {perplexity['distilled']:.1f}"
        label = f"held-out perplexity, {ratio:.2f} x the teacher's; {perplexity['pruned']:,.1f} before distillation"
        tiles.append(tile(change, label))
    if (kept := accuracy_kept(content)) is not None:
        share, name, count = kept
        tasks = "1 task" if count == 1 else f"{count} tasks"
        tiles.append(tile(f"{share:.0%}", f"of the teacher's task scores kept ({name}, mean of {tasks})"))
    if tokens := tokens_trained(content):
        tiles.append(tile(compact(tokens), "tokens distilled on"))
    if content.seconds:
        tiles.append(tile(duration(sum(content.seconds.values())), _where(content)))
    return tiles


def tile(value: str, label: str) -> Row:
    """One thing of a headline."""
    return {"value": value, "label": label}


def _speed(content: ReportContent) -> Row:
    """Measured, or what the shapes say."""
    speed = content.results.get("evaluate", {}).get("speed")
    if speed:
        ratio = next(iter(speed["ratio"].values()))
        decode, prefill = ratio["decode_tokens_per_second"], ratio["prefill_tokens_per_second"]
        label = f"tokens/s in generating ({decode['least']:.2f} to {decode['most']:.2f} by round)"
        return tile(f"{decode['median']:.2f} x", f"{label}; {prefill['median']:.2f} x in reading")
    before, after = (matrix_count(spec) for spec in (content.teacher, content.student))
    return tile(f"{after / before:.2f} x", "multiplications per token; speed was not measured")


def accuracy_kept(content: ReportContent) -> tuple[float, str, int] | None:
    """Mean over tasks of the finished student's score over the teacher's, which model that is, and how many tasks."""
    tasks = content.results.get("evaluate", {}).get("tasks") or {}
    name = next((name for name in ("tuned", "distilled") if name in tasks), None)
    values = [] if name is None else list(measured.shares(tasks).get(name, {}).values())
    return (sum(values) / len(values), str(name), len(values)) if values else None


def tokens_trained(content: ReportContent) -> int | None:
    """Tokens of all rounds' distillations."""
    total = sum(row["tokens"] or 0 for row in content.rounds)
    return total or content.results.get("distill", {}).get("tokens")


def _where(content: ReportContent) -> str:
    hardware = content.manifest.get("hardware", {})
    gpus = hardware.get("gpus") or []
    return f"in all, on {len(gpus)} x {gpus[0]}" if gpus else f"in all, on {hardware.get('cores', '?')} CPU cores"


def size(count: float) -> str:
    """Bytes for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


# -- models ----------------------------------------------------------------------------------------------------------


def architecture(content: ReportContent) -> Row:
    """Every size before and after."""
    rows, styles = [], []
    student = named_sizes(content.student)
    for label, before in named_sizes(content.teacher).items():
        after = student.get(label, 0)
        styles.append("strong" if label == PARAMETERS else ("same" if before == after else ""))
        rows.append((label, f"{before:,}", f"{after:,}", f"{after / before:.1%}" if before else ""))
    return {"headings": ("size", "teacher", "student", "kept"), "rows": rows, "styles": styles}


def dropped(content: ReportContent) -> str:
    """The layers that went, in the teacher's numbering."""
    return ", ".join(map(str, content.importance.dropped_layers)) if content.importance else ""


def quality(content: ReportContent) -> Row | None:
    """Held-out perplexity, bits per byte and their errors by model."""
    evaluated = content.results.get("evaluate", {})
    nats, errors = evaluated.get("nats", {}), evaluated.get("standard_error", {})
    bits = evaluated.get("bits_per_byte", {})
    rows = []
    for name, value in content.perplexity.items():
        count = content.parameters["teacher" if name == "teacher" else "student"]
        row = [name, compact(count), f"{nats[name]:.4f}" if name in nats else ""]
        row += [_with_error(bits[name]) if name in bits else ""] if bits else []
        row += [f"{value:,.2f}" + (f" ± {errors[name]:.2f}" if errors.get(name) else "")]
        row += [f"{value / content.perplexity['teacher']:.2f} x" if "teacher" in content.perplexity else ""]
        rows.append(row)
    if not rows:
        return None
    headings = ["model", "parameters", "nats per token", *(["bits per byte"] if bits else [])]
    styles = ["strong" if row[0] == "distilled" else "" for row in rows]
    return {"headings": [*headings, "perplexity", "against the teacher"], "rows": rows, "styles": styles}


def _with_error(row: Row) -> str:
    error = "" if row.get("standard_error") is None else f" ± {row['standard_error']:.4f}"
    return f"{row['value']:.4f}{error}"


def quality_note(content: ReportContent) -> str:
    """What the perplexities were measured on."""
    evaluated = content.results.get("evaluate", {})
    counted = ", ".join(f"{evaluated[unit]:,} {unit}" for unit in ("tokens", "bytes") if evaluated.get(unit))
    documents = f"{evaluated['documents']:,} documents" if evaluated.get("documents") else "documents"
    return f"Measured on {counted + ' of ' if counted else ''}{documents} that nothing was trained or scored on."


def evaluated_sections(content: ReportContent) -> list[Row]:
    """Benchmark tasks and speed, as far as they were measured: `title`, `table`, `note`."""
    evaluated = content.results.get("evaluate", {})
    sections: list[Row] = []
    for title, key, table, note in (
        ("Benchmark tasks", "tasks", measured.task_table, measured.task_note),
        ("Speed", "speed", measured.speed_table, measured.speed_note),
    ):
        if found := evaluated.get(key):
            headings, rows = table(found)
            sections.append({"title": title, "table": {"headings": headings, "rows": rows}, "note": note(found)})
    return sections


# -- the work --------------------------------------------------------------------------------------------------------


def pipeline(content: ReportContent) -> Row:
    """Each stage: time, its part of all, cost in hours of the device, memory, speed."""
    total = sum(content.seconds.values())
    rows = []
    for name, result in content.results.items():
        seconds = result.get("seconds", 0.0)
        on_gpu = result.get("peak_gpu_memory_gb") or {}
        rows.append(
            (
                name,
                duration(seconds),
                f"{seconds / total:.0%}" if total else "",
                f"{device_hours(content, name, seconds):.3f}",
                f"{result['peak_memory_gb']:.2f} GB" if "peak_memory_gb" in result else "",
                f"{compact(result['tokens_per_second'])} tokens/s" if result.get("tokens_per_second") else "",
                f"{on_gpu['allocated']:.2f} of {on_gpu['reserved']:.2f} GB" if on_gpu else "",
                f"{result['mfu']:.1%}" if result.get("mfu") else "",
            )
        )
    hours = f"{'GPU' if on_gpus(content) else 'core'}-hours"
    headings = ("stage", "time", "of all", hours, "peak memory (rank 0)", "speed")
    if any(row[6] for row in rows):
        return {"headings": (*headings, "peak GPU memory (fullest rank), of reserved", "MFU"), "rows": rows}
    return {"headings": headings, "rows": [row[:6] for row in rows]}


def on_gpus(content: ReportContent) -> bool:
    """Whether the run's machine had GPUs."""
    return bool(content.manifest.get("hardware", {}).get("gpus"))


def device_hours(content: ReportContent, stage: str, seconds: float) -> float:
    """Hours of all GPUs that a stage held, one a rank; of all cores of the machine where there are no GPUs."""
    ranks, cores = content.records.get(stage, {}).get("ranks", 1), content.manifest.get("hardware", {}).get("cores", 1)
    return seconds / 3600 * float(ranks if on_gpus(content) else cores)


def curve(content: ReportContent) -> Row | None:
    """Held-out values along the distillation, at most a dozen of them, for those who cannot see the picture."""
    points = [row for row in content.metrics if "val/ce" in row or "val/kl" in row]
    if not points:
        return None
    step = -(-len(points) // _MAX_POINTS)
    chosen = [*points[:-1:step], points[-1]]
    rows = [(f"{row['tokens']:,}", *(_number(row.get(key)) for key in ("val/kl", "val/ce"))) for row in chosen]
    headings = ("tokens trained on", "KL to the teacher", "cross-entropy")
    teacher, _ = lines(content.metrics)
    rows.append(("teacher", "0" if teacher is not None else "", _number(teacher)))
    vocabulary = content.teacher.vocab_size
    rows.append((f"random init, ln({vocabulary:,})", "", _number(untrained_loss(vocabulary))))
    return {"headings": headings, "rows": rows}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def other_training(content: ReportContent) -> Row | None:
    """What the stages around distillation did to the model they trained, on what they validate on."""
    rows = []
    for name, model in (("correct", "teacher, on held-out text"), ("tune", "student, on held-out answers")):
        if (result := content.results.get(name)) is not None:
            first, last = result["history"][0]["ce"], result["validation"]["ce"]
            rows.append((name, model, f"{result['steps']:,}", compact(result["tokens"]), f"{first:.3f}", f"{last:.3f}"))
    headings = ("stage", "what", "steps", "tokens", "cross-entropy before", "after")
    return {"headings": headings, "rows": rows} if rows else None


def rounds(content: ReportContent) -> Row:
    """Sizes and KL after each round."""
    specs = [ModelSpec.from_dict(row["spec"]) for row in content.rounds]
    headings = ("after round", "parameters", *cut_sizes(specs[0]), "KL pruned", "KL distilled")
    rows = []
    for number, (row, spec) in enumerate(zip(content.rounds, specs, strict=True), start=1):
        kl = ("" if value is None else f"{value:.3f}" for value in row["kl"].values())
        sizes = cut_sizes(spec)
        found = (str(sizes.get(label, 0)) for label in cut_sizes(specs[0]))
        rows.append((str(number), compact(row["parameters"]), *found, *kl))
    return {"headings": headings, "rows": rows}


def data(sources: Row) -> Row:
    """What was given, what was used of it, and why the rest was not."""
    rows = [
        (row["kind"], _files(row["files"]), f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['skipped']:,}")
        for row in sources["rows"]
    ]
    rows += [("skipped", row["reason"], "", "", f"{row['documents']:,}") for row in sources["skipped"]]
    rows += [("not used", row["reason"], _files(row["files"]), "", "") for row in sources["left_out"]]
    return {"headings": ("source", "what", "documents", "tokens", "documents skipped"), "rows": rows}


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"


def samples(content: ReportContent) -> list[Row]:
    """How each model goes on from the same beginning."""
    texts = content.results.get("evaluate", {}).get("samples", {})
    prompt = texts.get("prompt", "")
    return [{"name": name, "role": name, "prompt": prompt, "text": texts[name]} for name in MODELS if name in texts]


def objective(content: ReportContent) -> str:
    """What the student was trained on, in words."""
    return str(content.results.get("distill", {}).get("objective", "forward KL over the full vocabulary"))


# -- where it comes from ---------------------------------------------------------------------------------------------


def provenance(content: ReportContent) -> list[tuple[str, str]]:
    """Seed, commit, machine, versions."""
    manifest = content.manifest
    hardware = manifest.get("hardware", {})
    machine = f"{hardware.get('processor')}, {hardware.get('cores')} cores, {hardware.get('memory_gb')} GB memory"
    gpus = hardware.get("gpus") or []
    precision = (manifest.get("precision") or {}).get("chosen")
    found = [
        *([("seed", str(manifest["seed"]))] if "seed" in manifest else []),
        ("commit", str(manifest.get("git") or "not run from a git checkout")),
        *([("machine", machine + (f", {', '.join(gpus)}" if gpus else ", no GPU"))] if hardware else []),
        *([("precision", f"{precision}, chosen by measurement")] if precision else []),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())),
    ]
    commands = manifest.get("commands", [])
    return [*found, ("started", str(commands[0]["start"]))] if commands else found


def commands(content: ReportContent) -> list[str]:
    """What was typed, oldest first, each once."""
    return list(dict.fromkeys(str(row["command"]) for row in content.manifest.get("commands", [])))


def digests(content: ReportContent) -> Row | None:
    """SHA-256 of all that each stage's result follows from, and of the architectures and the plan."""
    rows = [(f"stage {name}", str(record["digest"])) for name, record in content.records.items() if "digest" in record]
    for name, key, what in (
        ("import", "spec_digest", "architecture of the teacher"),
        ("prune", "spec_digest", "architecture of the student"),
        ("prune", "plan_digest", "plan"),
    ):
        if found := content.results.get(name, {}).get(key):
            rows.append((what, str(found)))
    return {"headings": ("of", "SHA-256"), "rows": rows} if rows else None
