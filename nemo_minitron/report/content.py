"""What a report is made from: the stages' results as plain data. Whatever is missing is left out of the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.report.measured import shares

MODELS = ("teacher", "pruned", "distilled", "tuned")

Row = dict[str, Any]
Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What the teacher loses without some of its layers, by metric."""

    layers: dict[str, Vector]
    """Each single layer `[layers]`; empty if only longer blocks were measured."""
    blocks: dict[str, dict[int, Vector]]
    """By length of the block, every block of 2 or more layers by its first one `[layers - length + 1]`."""
    samples: int


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scores of the teacher's units, and which of them stayed. Layers are the teacher's, in order."""

    block_influence: Vector
    """`[layers]`; mean of 1 - cos(input, output) over calibration tokens."""
    hidden: Vector
    """`[hidden_size]`."""
    units: dict[Axis, tuple[Vector, ...]]
    """By axis of layers that is measured itself: for each layer one vector `[units]`, empty where a layer has none."""
    kept_hidden: tuple[int, ...]
    kept: dict[int, Mapping[Axis, tuple[int, ...]]]
    """Indices that stay, by layer and axis; a dropped layer has no entry."""
    depth: Depth | None = None
    """If it was measured."""

    @property
    def dropped_layers(self) -> list[int]:
        """Layers that are gone."""
        return [layer for layer in range(len(self.block_influence)) if layer not in self.kept]


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """A run, as far as it has come."""

    name: str
    teacher: ModelSpec
    student: ModelSpec
    results: dict[str, Row]
    """Each stage's `result.json`."""
    manifest: Row
    recipe: str
    """The resolved recipe as YAML."""
    source: str = ""
    """Where the teacher came from."""
    importance: Importance | None = None
    metrics: list[Row] = field(default_factory=list)
    """Rows of the distillation's `metrics.jsonl`."""
    rounds: list[Row] = field(default_factory=list)
    """Sizes (`spec`, `parameters`), `tokens` and `kl` before and after distillation of each round."""
    records: dict[str, Row] = field(default_factory=dict)
    """Each stage's `DONE`: its digest, attempts, ranks."""

    @property
    def perplexity(self) -> dict[str, float]:
        """Held-out perplexity by model, in the order of `MODELS`."""
        measured = self.results.get("evaluate", {}).get("perplexity", {})
        return {name: float(measured[name]) for name in MODELS if name in measured}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, all attempts together."""
        return {name: float(result["seconds"]) for name, result in self.results.items() if "seconds" in result}

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of teacher and student; a tied embedding counts once."""
        return {"teacher": parameter_count(self.teacher), "student": parameter_count(self.student)}

    @property
    def command(self) -> str:
        """The newest command of the run."""
        commands = self.manifest.get("commands", [])
        return str(commands[-1]["command"]) if commands else ""


def summary(content: ReportContent) -> Row:
    """What other programs read: `summary.json`."""
    distill, evaluate = content.results.get("distill", {}), content.results.get("evaluate", {})
    perplexity = content.perplexity
    ratios = {name: value / perplexity["teacher"] for name, value in perplexity.items() if "teacher" in perplexity}
    return {
        "name": content.name,
        "source": content.source,
        "params": content.parameters,
        "params_non_embedding": {
            "teacher": parameter_count(content.teacher, embeddings=False),
            "student": parameter_count(content.student, embeddings=False),
        },
        "architecture": {"teacher": content.teacher.to_dict(), "student": content.student.to_dict()},
        "rounds": [{key: value for key, value in row.items() if key != "spec"} for row in content.rounds],
        "dropped_layers": content.importance.dropped_layers if content.importance else None,
        "perplexity": perplexity,
        "perplexity_ratio": ratios,
        "nats": evaluate.get("nats", {}),
        "bits_per_byte": evaluate.get("bits_per_byte", {}),
        "tasks": evaluate.get("tasks", {}),
        "task_score_kept": shares(evaluate.get("tasks", {})),
        "generation": evaluate.get("speed", {}),
        "data": content.results.get("data", {}).get("sources"),
        "heldout_tokens": evaluate.get("tokens"),
        "heldout_bytes": evaluate.get("bytes"),
        "heldout_documents": evaluate.get("documents"),
        "tokens": sum(row["tokens"] or 0 for row in content.rounds) or distill.get("tokens"),
        "tokens_per_second": distill.get("tokens_per_second"),
        "validation": distill.get("validation"),
        "seconds": content.seconds,
        "seconds_total": round(sum(content.seconds.values()), 3),
        "peak_memory_gb": {
            name: result["peak_memory_gb"] for name, result in content.results.items() if "peak_memory_gb" in result
        },
        "peak_gpu_memory_gb": {
            name: result["peak_gpu_memory_gb"]
            for name, result in content.results.items()
            if "peak_gpu_memory_gb" in result
        },
        "speed": {
            name: {key: result[key] for key in ("tokens_per_second", "mfu") if result.get(key) is not None}
            for name, result in content.results.items()
            if result.get("tokens_per_second")
        },
        "command": content.command,
        **{key: content.manifest.get(key) for key in ("seed", "version", "git", "versions", "hardware")},
    }
