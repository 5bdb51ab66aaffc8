"""Report: what the run came to, as `report.html`, `summary.json` and `README.md` at the top of its folder."""

from pathlib import Path
from typing import Any

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.callbacks.metrics_file import read_rows
from nemo_minitron.callbacks.reporter import duration
from nemo_minitron.config.load import to_yaml
from nemo_minitron.config.run import TargetConfig
from nemo_minitron.report import build
from nemo_minitron.report.content import Importance, ReportContent, summary
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.files import read_json, write_json, write_text

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
    folder = context.run
    finished = [path.name for path in folder.stages.iterdir() if folder.is_whole(path.name)]
    order = ("import", "data", "score", "prune", "distill", "evaluate", "export")
    results = {name: folder.result(name) for name in order if name in finished}
    return ReportContent(
        name=context.config.name,
        source=source_name(context.config.model.source),
        teacher=ModelSpec.from_dict(results["import"]["spec"]),
        student=ModelSpec.from_dict(results["prune"]["spec"]),
        results=results,
        manifest=read_json(folder.path / "manifest.json"),
        recipe=to_yaml(context.config),
        importance=importance(
            folder.stage("score") / "scores.safetensors", folder.stage("prune") / "plan.json", context.config.target
        ),
        metrics=_metrics(folder.stage("distill") / "metrics.jsonl"),
    )


def importance(scores_path: Path, plan_path: Path, target: TargetConfig) -> Importance:
    """Scores of the teacher's units in the aggregation that the plan was built with, and what the plan keeps."""
    from nemo_minitron.pruning.plan import PruningPlan
    from nemo_minitron.pruning.scores import Scores

    scores, plan = Scores.load(scores_path), PruningPlan.load(plan_path)
    how: dict[str, Any] = {"batch": target.batch_aggregation, "sequence": target.sequence_aggregation}
    layers = range(scores.spec.num_layers)
    return Importance(
        block_influence=scores.block_influence().double().numpy(),
        hidden=scores.hidden(**how).double().numpy(),
        ffn=tuple(scores.ffn(layer, **how).double().numpy() for layer in layers),
        heads=tuple(scores.heads(layer, **how).double().numpy() for layer in layers),
        kept_hidden=plan.hidden,
        kept_ffn={layer.source: layer.ffn for layer in plan.layers},
        kept_heads={layer.source: layer.heads for layer in plan.layers},
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
