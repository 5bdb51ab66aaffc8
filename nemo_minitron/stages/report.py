"""Report: what the run came to, as `report.html`, `summary.json` and `README.md` at the top of its folder."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.arch.axes import LAYER_AXES, Axis, PrunableAxis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.callbacks.reporter import duration
from nemo_minitron.config.load import to_yaml
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.json_lines import read_rows
from nemo_minitron.report import build
from nemo_minitron.report.content import Depth, Importance, ReportContent, Row, Vector, summary
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.chain import round_name
from nemo_minitron.stages.files import read_json, write_json, write_text
from nemo_minitron.stages.run_folder import RunFolder

if TYPE_CHECKING:
    from nemo_minitron.pruning.depth import DepthScores
    from nemo_minitron.pruning.scores import Scores

FILES = ("report.html", "summary.json", "README.md")


def run(context: StageContext) -> dict[str, Any]:
    """Write the three files; returns their names."""
    content = gather(context)
    write_text(context.out / "report.html", build.html(content))
    write_json(context.out / "summary.json", summary(content))
    write_text(context.out / "README.md", build.readme(content))
    for name in FILES:
        write_text(context.run.path / name, (context.out / name).read_text(encoding="utf-8"))
    return {"files": list(FILES), "summary": f"report.html; the stages before took {_total(content)}"}


def gather(context: StageContext) -> ReportContent:
    """Read what the other stages left."""
    folder, rounds = context.run, context.config.rounds
    results = {name: folder.result(name) for name in context.stage.needs}
    return ReportContent(
        name=context.config.name,
        source=source_name(context.config.model.source),
        teacher=ModelSpec.from_dict(results["import"]["spec"]),
        student=ModelSpec.from_dict(results["prune"]["spec"]),
        results=results,
        manifest=read_json(folder.path / "manifest.json"),
        recipe=to_yaml(context.config),
        importance=importance(
            folder.stage(round_name("score", 1, rounds)) / "scores.safetensors",
            [folder.stage(round_name("prune", number, rounds)) / "plan.json" for number in range(1, rounds + 1)],
            context.config.target,
        ),
        rounds=[_round(folder, number, rounds) for number in range(1, rounds + 1)],
        metrics=_metrics(folder.stage("distill") / "metrics.jsonl"),
    )


def _round(folder: RunFolder, number: int, rounds: int) -> Row:
    """What one round cut, and how close to the teacher its distillation came."""
    pruned, distilled = (folder.result(round_name(stage, number, rounds)) for stage in ("prune", "distill"))
    history = distilled.get("history") or [{}]
    return {
        "spec": pruned["spec"],
        "parameters": pruned["parameters"],
        "tokens": distilled.get("tokens"),
        "kl": {"pruned": history[0].get("kl"), "distilled": (distilled.get("validation") or {}).get("kl")},
    }


def importance(scores_path: Path, plan_paths: Sequence[Path], target: TargetConfig) -> Importance:
    """Scores of the teacher's units in the aggregation that the plan was built with, and what all plans together keep.

    After the first round the scores were taken anew on a smaller model; the teacher's own are those of the first.
    """
    from nemo_minitron.pruning.plan import PruningPlan
    from nemo_minitron.pruning.scores import Scores

    scores = Scores.load(scores_path)
    plan = reduce(PruningPlan.compose, map(PruningPlan.load, plan_paths))
    how: dict[str, Any] = {"batch": target.batch_aggregation, "sequence": target.sequence_aggregation}
    layers = range(scores.spec.num_layers)
    return Importance(
        block_influence=scores.block_influence().double().numpy(),
        hidden=scores.importance(Axis.HIDDEN, **how).double().numpy(),
        units={
            row.axis: tuple(_units(scores, row, layer, how) for layer in layers)
            for row in LAYER_AXES
            if row.sites and scores.spec.common_size(row)
        },
        kept_hidden=plan.hidden,
        kept={layer.source: layer.kept for layer in plan.layers},
        depth=None if scores.depth is None else depth_curves(scores.depth),
    )


def _units(scores: "Scores", row: PrunableAxis, layer: int, how: Mapping[str, Any]) -> Vector:
    """Importance of a layer's units; of a layer that does not have the axis, none."""
    if not scores.spec.size(row, layer):
        return np.empty(0)
    units: Vector = scores.importance(row.axis, layer, **how).double().numpy()
    return units


def depth_curves(scores: "DepthScores") -> Depth:
    """Depth metrics as the report draws them."""
    lengths = sorted({length for _, length in scores.blocks if length > 1})
    return Depth(
        layers={metric: scores.layers(metric).numpy() for metric in scores.metrics},
        blocks={m: {length: scores.curve(m, length).numpy() for length in lengths} for m in scores.metrics},
        samples=scores.samples,
    )


def source_name(source: str) -> str:
    """A model's short name: the last part of its path, without the suffix and checksum."""
    last = source.split("#", 1)[0].rstrip("/").rpartition("/")[2]
    for suffix in (".gguf", ".nemo"):
        last = last.removesuffix(suffix)
    return last or source


def _metrics(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.is_file() else []


def _total(content: ReportContent) -> str:
    return duration(sum(content.seconds.values()))
