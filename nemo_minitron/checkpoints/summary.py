"""What a checkpoint is, in a few lines or as JSON, without building a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.arch.axes import MODEL_AXES, PrunableAxis
from nemo_minitron.arch.sizes import layer_axes
from nemo_minitron.arch.spec import LinearScaling, ModelSpec, RopeScaling, YarnScaling
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.sidecar import tokenizer_problem
from nemo_minitron.checkpoints.source import PLAN_FILE, Checkpoint, tokenizer_digest
from nemo_minitron.checkpoints.special_ids import ids_of
from nemo_minitron.errors import CheckpointError


def summary(source: Checkpoint, path: Path) -> dict[str, Any]:
    """Format, sizes, tokenizer, lineage and digests of a checkpoint as JSON data.

    Weights are counted and their types known from headers; none is read.
    """
    spec = source.spec
    files, problem = tokenizer_of(source, path)
    return {
        "path": str(path),
        "format": _format(source, path),
        "family": source.family,
        "dtype": str(source.dtype).removeprefix("torch."),
        "parameters": parameter_count(spec),
        "parameters_without_embeddings": parameter_count(spec, embeddings=False),
        "architecture": spec.to_dict(),
        "tokenizer": None if problem else _tokenizer(files),
        "tokenizer_problem": problem,
        "special_ids": ids_of(files),
        "lineage": dict(source.lineage),
        "files": sorted(files),
        "notes": list(source.notes()),
        "carries_plan": PLAN_FILE in files,
        "digests": {"architecture": spec.digest(), "tokenizer": tokenizer_digest(files)},
    }


def tokenizer_of(source: Checkpoint, path: Path) -> tuple[dict[str, bytes], str]:
    """Files that travel with a checkpoint, and why its tokenizer cannot be used; "" if it can."""
    try:
        files = source.tokenizer_files()
    except CheckpointError as error:
        return {}, error.what
    return files, tokenizer_problem(files, where=str(path))


def lines(data: Mapping[str, Any]) -> list[str]:
    """A summary for people: a name and a value per line."""
    spec = ModelSpec.from_dict(data["architecture"])
    tokenizer = data["tokenizer"]
    rows = [
        ("format", data["format"]),
        ("family", data["family"]),
        ("parameters", f"{data['parameters']:,} ({data['parameters_without_embeddings']:,} without embeddings)"),
        ("type", data["dtype"]),
        *_sizes(spec),
        ("tokenizer", f"{tokenizer['kind']}, {tokenizer['size']} tokens" if tokenizer else _unusable(data)),
        ("special ids", ", ".join(f"{key.removesuffix('_token_id')} {v}" for key, v in data["special_ids"].items())),
        *_lineage(data["lineage"]),
        ("plan", f"carried ({PLAN_FILE})" if data["carries_plan"] else "none"),
        ("files", ", ".join(data["files"]) or "none"),
        *((f"{name} digest", value or "none") for name, value in data["digests"].items()),
        *(("note", note) for note in data["notes"]),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _format(source: Checkpoint, path: Path) -> str:
    detail = "" if source.format == "GGUF" else ", a folder" if path.is_dir() else ", a file"
    return f"{source.format}{detail}" + (f", weights as {source.layout}" if source.layout else "")


def _sizes(spec: ModelSpec) -> list[tuple[str, str]]:
    def span(row: PrunableAxis) -> str:
        values = [size for layer in spec.layers if (size := layer.size(row))]
        low, high = min(values), max(values)
        found = str(low) if low == high else f"{low} to {high}, by layer"
        if len(values) < spec.num_layers:
            found += f", in {len(values)} layers"
        return f"{found} of {spec.head_dim} channels" if row.is_head else found

    found = [
        *((row.label, str(spec.size(row))) for row in MODEL_AXES),
        *((row.label, span(row)) for row in layer_axes(spec)),
        *_routing(spec),
        ("vocabulary", f"{spec.vocab_size}{', tied to the output layer' if spec.tied_embeddings else ''}"),
        ("context", str(spec.max_position_embeddings)),
        ("rotary base", f"{spec.rotary_base:g}{_scaling(spec)}" if spec.rotary_percent else "none"),
        ("MLP and norm", f"{spec.activation}, {spec.norm} (eps {spec.norm_eps:g})"),
    ]
    if spec.sliding_window:
        found.append(
            ("sliding window", f"{spec.sliding_window}, in {sum(layer.local for layer in spec.layers)} layers")
        )
    return found


def _routing(spec: ModelSpec) -> list[tuple[str, str]]:
    """How tokens find their experts, for a model that has some."""
    routers = dict.fromkeys(layer.moe for layer in spec.layers if layer.has_experts)
    if not routers:
        return []
    first = next(iter(routers))
    extra = (", normalised" if first.normalize_top_k else "") + (", correction bias" if first.correction_bias else "")
    top = sorted({each.top_k for each in routers})
    active = parameter_count(spec, active=True)
    words = f"{' or '.join(map(str, top))} experts a token, {first.score_function}{extra}"
    return [("router", words), ("active parameters", f"{active:,}")]


def _scaling(spec: ModelSpec) -> str:
    match spec.rope_scaling:
        case None:
            return ""
        case LinearScaling(factor=factor):
            return f", positions divided by {factor:g}"
        case RopeScaling(factor=factor, original_max_position_embeddings=original):
            return f", Llama 3 scaling by {factor:g} from {original} positions"
        case YarnScaling(factor=factor, original_max_position_embeddings=original):
            return f", YaRN by {factor:g} from {original} positions"


def _unusable(data: Mapping[str, Any]) -> str:
    carried = any(name.startswith(("tokenizer", "tekken")) for name in data["files"])
    problem = data["tokenizer_problem"]
    return f"cannot be used: {problem}" if carried or not problem.startswith("there is no") else "none"


def _tokenizer(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    if "tokenizer.json" in files:
        data = json.loads(files["tokenizer.json"])
        model = data.get("model") or {}
        added = {token.get("content") for token in data.get("added_tokens") or ()}
        return {"kind": str(model.get("type", "unknown")), "size": len({*_tokens(model.get("vocab")), *added})}
    return None


def _tokens(vocabulary: Any) -> list[Any]:
    """Tokens of a vocabulary: a mapping from them, or pairs of a token and its score."""
    return [item if isinstance(item, str) else item[0] for item in vocabulary or ()]


def _lineage(lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [
        ("base model", str(lineage.get("base_model") or "unknown")),
        ("licence", str(lineage.get("license") or "unknown")),
    ]
    steps = lineage.get("pruned") or []
    for number, step in enumerate(steps, start=1):
        if isinstance(step, Mapping):
            what = ", ".join(f"{key} {str(value)[:16]}" for key, value in step.items())
            found.append(("pruned" if len(steps) == 1 else f"pruned, step {number}", what))
    known = ("base_model", "license", "pruned")
    found += [
        (str(key), str(value)) for key, value in lineage.items() if key not in known and isinstance(value, str | int)
    ]
    return found
