"""Report: what the run came to, as `report.html`, `summary.json` and `README.md` at the top of its folder."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.arch.axes import LAYER_AXES, Axis, PrunableAxis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.callbacks.reporter import duration
from nemo_minitron.config.load import load_recipe, to_yaml
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import RunFolderError
from nemo_minitron.json_lines import read_rows
from nemo_minitron.report import build
from nemo_minitron.report.compare import Compared, comparison
from nemo_minitron.report.content import Depth, Importance, ReportContent, Row, Vector, summary
from nemo_minitron.stages import manifest
from nemo_minitron.stages.base import StageContext, flatten
from nemo_minitron.stages.chain import chain_for, round_name
from nemo_minitron.stages.files import write_json, write_text
from nemo_minitron.stages.run_folder import RunFolder

if TYPE_CHECKING:
    from nemo_minitron.pruning.depth import DepthScores
    from nemo_minitron.pruning.scores import Scores

FILES = ("report.html", "summary.json", "README.md")
NEEDED = ("import", "score", "prune")
"""Without these there is nothing to say of a run."""


def run(context: StageContext) -> dict[str, Any]:
    """Write the three files, and the export's card; returns the names of the three."""
    content = gather(context.run, context.config)
    _write(content, context.out)
    for name in FILES:
        write_text(context.run.path / name, (context.out / name).read_text(encoding="utf-8"))
    _refresh_card(context.run, context.config, content)
    return {"files": list(FILES), "summary": f"report.html; the stages before took {_total(content)}"}


def again(path: Path, out: Path | None = None) -> Path:
    """Make the report of a run folder anew from what its stages have left so far; returns the page.

    Args:
        path: The run folder.
        out: Where the page goes; None: the three files at the top of the run folder are replaced.

    Raises:
        RunFolderError: It is no run folder, another process works there, or too little of it is finished.
    """
    folder = RunFolder(path)
    config = recipe_of(folder)
    content = gather(folder, config)
    if out is not None:
        _write_page(out, build.html(content))
        return out
    with folder.locked():
        _write(content, folder.path)
        _refresh_card(folder, config, content)
    return folder.path / FILES[0]


def compare(paths: Sequence[Path], out: Path) -> Path:
    """Write one page on several run folders; returns it.

    Raises:
        RunFolderError: One is no run folder, or too little of it is finished.
    """
    runs = []
    for name, path in zip(_short_names(paths), paths, strict=True):
        folder = RunFolder(path)
        config = recipe_of(folder)
        settings = flatten(config.model_dump(mode="json"), "")
        shown = {key.removeprefix("."): value for key, value in settings.items()}
        runs.append(Compared(name=name, content=gather(folder, config, scores=False), settings=shown))
    _write_page(out, comparison(runs))
    return out


def _write_page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def recipe_of(folder: RunFolder) -> RunConfig:
    """The recipe of a run folder's newest command.

    Raises:
        RunFolderError: It is no run folder, or has not come far enough for a report.
    """
    resolved = folder.path / "config.resolved.yaml"
    if not resolved.is_file() or not (folder.path / "manifest.json").is_file():
        raise RunFolderError(
            f"{folder.path}: no run has begun here",
            rule="a run folder holds manifest.json and config.resolved.yaml",
            remedy="name the folder that `nemo-minitron run` printed, or that --run-dir gave",
        )
    for name in NEEDED:
        folder.stage(name)
    return load_recipe(resolved)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of some paths, as many as tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    absolute = [path.absolute() for path in paths]
    raise RunFolderError(
        f"{next(path for path in absolute if absolute.count(path) > 1)}: named twice",
        rule="each run folder is compared once",
        remedy="leave the second one out",
    )


def _write(content: ReportContent, out: Path) -> None:
    write_text(out / "report.html", build.html(content))
    write_json(out / "summary.json", summary(content))
    write_text(out / "README.md", build.readme(content))


def _refresh_card(folder: RunFolder, config: RunConfig, content: ReportContent) -> None:
    if "export" in content.records:
        from nemo_minitron.stages import cards  # loads torch

        cards.refresh(folder, config, content)


def gather(folder: RunFolder, config: RunConfig, *, scores: bool = True) -> ReportContent:
    """Read what the stages left; what is not finished is left out.

    Args:
        folder: The run; stages import and prune are finished.
        config: Its recipe.
        scores: Whether to read the scores, which are large.
    """
    rounds = config.rounds
    records = folder.current([stage.name for stage in chain_for(config) if stage.name != "report"])
    for name in (name for name in NEEDED if name not in records):
        raise RunFolderError(
            f"{folder.path}: stage {name} is older than a stage that it was made from",
            rule="a report shows one state of a run",
            remedy="run the recipe again, which brings what follows up to date",
        )
    names = list(records)
    results = {name: folder.result(name) for name in names}
    return ReportContent(
        name=config.name,
        source=source_name(config.model.source),
        teacher=ModelSpec.from_dict(results["import"]["spec"]),
        student=ModelSpec.from_dict(results["prune"]["spec"]),
        results=results,
        manifest=manifest.read(folder.path),
        recipe=to_yaml(config),
        importance=_importance(folder, config) if scores else None,
        rounds=[_round(results, number, rounds) for number in range(1, rounds + 1)],
        metrics=read_rows(folder.stages / "distill" / "metrics.jsonl") if "distill" in results else [],
        records=records,
    )


def _importance(folder: RunFolder, config: RunConfig) -> Importance:
    rounds = config.rounds
    return importance(
        folder.stage(round_name("score", 1, rounds)) / "scores.safetensors",
        [folder.stage(round_name("prune", number, rounds)) / "plan.json" for number in range(1, rounds + 1)],
        config.target,
    )


def _round(results: Mapping[str, dict[str, Any]], number: int, rounds: int) -> Row:
    """What one round cut, and how close to the teacher its distillation came."""
    pruned = results[round_name("prune", number, rounds)]
    distilled = results.get(round_name("distill", number, rounds), {})
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
    how: dict[str, Any] = {
        "batch": target.batch_aggregation,
        "sequence": target.sequence_aggregation,
        "experts": target.expert_metric,
    }
    layers = range(scores.spec.num_layers)
    return Importance(
        block_influence=scores.block_influence().double().numpy(),
        hidden=scores.importance(Axis.HIDDEN, **how).double().numpy(),
        units={
            row.axis: tuple(_units(scores, row, layer, how) for layer in layers)
            for row in LAYER_AXES
            # Neurons of experts are too many for a picture.
            if (row.sites or row.token_sums) and not row.each and scores.spec.common_size(row)
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
    lengths = [length for length in scores.lengths if length > 1]
    alone = scores.metrics if 1 in scores.lengths else ()
    return Depth(
        layers={metric: scores.layers(metric).numpy() for metric in alone},
        blocks={m: {length: scores.curve(m, length).numpy() for length in lengths} for m in scores.metrics},
        samples=scores.samples,
    )


def source_name(source: str) -> str:
    """A model's short name: the last part of its path, without the suffix and checksum."""
    last = source.split("#", 1)[0].rstrip("/").rpartition("/")[2]
    for suffix in (".gguf", ".nemo"):
        last = last.removesuffix(suffix)
    return last or source


def _total(content: ReportContent) -> str:
    return duration(sum(content.seconds.values()))
