"""`nemo-minitron plan`: pruning plans by hand, between scores and checkpoints."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_minitron.cli.failures import reported

if TYPE_CHECKING:
    from nemo_minitron.pruning.plan import PruningPlan

app = typer.Typer(help="Make, look at, compare and apply pruning plans.", no_args_is_help=True)


class To(StrEnum):
    """Formats of a pruned checkpoint."""

    HF = "hf"
    NEMO = "nemo"
    BOTH = "both"


PlanPath = Annotated[
    Path, typer.Argument(metavar="PLAN", help="A plan.json, or a pruned checkpoint: the plan that led to it.")
]
Target = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe's target section, as hidden_size=0.8."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the plan goes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, on one line.")]


@app.command()
def show(plan: PlanPath, *, as_json: Json = False, debug: Debug = False) -> None:
    """Print what a plan keeps: sizes before and after, the layers that go, digest and provenance."""
    with reported(debug=debug):
        found = _read(plan)
        print(json.dumps(found.to_dict() | {"digest": found.digest()}) if as_json else _told(found))


@app.command()
def diff(first: PlanPath, second: PlanPath, *, as_json: Json = False, debug: Debug = False) -> None:
    """Print what two plans for one model decide differently, axis by axis."""
    with reported(debug=debug):
        from nemo_minitron.pruning.diff import diff_plans

        found = diff_plans(_read(first), _read(second))
        print(json.dumps(found.to_dict()) if as_json else found.table())


@app.command()
def build(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="A scores.safetensors.")],
    target: Target = None,
    *,
    output: Output = Path("plan.json"),
    debug: Debug = False,
) -> None:
    """Decide what stays by importance scores."""
    with reported(debug=debug):
        from nemo_minitron.config.load import load_target
        from nemo_minitron.pruning.build import build_plan
        from nemo_minitron.pruning.scores import Scores

        wanted = load_target(target or [])
        found = Scores.load(scores)
        _keep(build_plan(found, wanted, found.spec), output)


@app.command()
def random(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The checkpoint to prune.")],
    target: Target = None,
    *,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal plans, on every machine.")],
    output: Output = Path("plan.json"),
    debug: Debug = False,
) -> None:
    """Choose what stays at random: the baseline that scores must beat."""
    with reported(debug=debug):
        from nemo_minitron.checkpoints.open import open_checkpoint
        from nemo_minitron.config.load import load_target
        from nemo_minitron.pruning.build import random_plan

        wanted = load_target(target or [])
        _keep(random_plan(wanted, open_checkpoint(model).spec, seed=seed), output)


@app.command()
def apply(
    plan: PlanPath,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint that the plan is for.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A folder, or a .nemo file; with --to both DST_hf/ and DST.nemo.")
    ],
    *,
    to: Annotated[To, typer.Option("--to", help="What to write.")] = To.HF,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is already there.")] = False,
    debug: Debug = False,
) -> None:
    """Cut a checkpoint (Hugging Face, .nemo, or its folder) tensor by tensor, on the CPU, building no model."""
    with reported(debug=debug):
        from nemo_minitron.checkpoints.convert import check_target
        from nemo_minitron.checkpoints.open import open_checkpoint
        from nemo_minitron.config.run import ExportFormat
        from nemo_minitron.pruning.apply import PrunedSource
        from nemo_minitron.pruning.write import paths_of, write_checkpoint

        formats = tuple(ExportFormat) if to is To.BOTH else (ExportFormat(to.value),)
        student = PrunedSource(open_checkpoint(source), _read(plan))
        for path in paths_of(destination, formats).values():
            check_target(source, path, replace=force)
        for path in write_checkpoint(student, destination, formats).values():
            print(path)


def _read(path: Path) -> "PruningPlan":
    from nemo_minitron.pruning.plan import PruningPlan

    is_checkpoint = path.is_dir() or path.suffix == ".nemo"
    return PruningPlan.of_checkpoint(path) if is_checkpoint else PruningPlan.load(path)


def _keep(plan: "PruningPlan", path: Path) -> None:
    plan.save(path)
    print(f"{_told(plan)}\n{path}")


def _told(plan: "PruningPlan") -> str:
    lines = [plan.table(), f"digest: {plan.digest()}"]
    if plan.provenance:
        lines.append(f"made from: {json.dumps(dict(plan.provenance), sort_keys=True)}")
    return "\n".join(lines)
