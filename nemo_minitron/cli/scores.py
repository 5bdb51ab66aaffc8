"""`nemo-minitron scores`: look at score files, and merge those of parts of a calibration set."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_minitron.cli.failures import reported

if TYPE_CHECKING:
    from nemo_minitron.pruning.scores import Scores

app = typer.Typer(help="Look at and merge importance scores.", no_args_is_help=True)

BARS = 40
"""Characters of the longest bar."""

Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, on one line.")]


@app.command()
def show(
    scores: Annotated[Path, typer.Argument(metavar="FILE", help="A scores.safetensors.")],
    *,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what scores rest on, where they were taken, and how much each layer does."""
    with reported(debug=debug):
        from nemo_minitron.pruning.scores import Scores

        found = Scores.load(scores)
        print(json.dumps(_facts(found)) if as_json else _told(found))


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Score files of different samples.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where the merged scores go.")],
    debug: Debug = False,
) -> None:
    """Add up score files of parts of calibration data, as if all had been scored at once."""
    with reported(debug=debug):
        from nemo_minitron.errors import ScoresError
        from nemo_minitron.pruning.scores import Scores

        if len(files) < 2:
            raise ScoresError(f"{len(files)} score file to merge", rule="at least two", remedy="name more files")
        first, *others = (Scores.load(path) for path in files)
        merged = first.merge(*others)
        merged.save(out)
        print(f"{out}: {merged.samples:,} samples, {merged.tokens:,} tokens of {len(files)} files")


def _facts(scores: "Scores") -> dict[str, Any]:
    return {
        "spec": scores.spec.to_dict(),
        "spec_digest": scores.spec.digest(),
        "samples": scores.samples,
        "tokens": scores.tokens,
        "ffn_site": scores.ffn_site.value,
        "sites": scores.sites,
        "provenance": scores.provenance,
        "block_influence": scores.block_influence().tolist(),
        "depth_metrics": list(scores.depth.metrics) if scores.depth is not None else [],
    }


def _told(scores: "Scores") -> str:
    from nemo_minitron.pruning.ranges import to_ranges

    spec = scores.spec
    known = [str(part) for part in scores.coverage] or ["unknown; they cannot be merged"]
    lines = [
        f"{spec.num_layers} layers, hidden {spec.hidden_size} (spec {spec.digest()[:12]})",
        f"{scores.samples:,} samples, {scores.tokens:,} tokens: {'; '.join(known)}",
        *(f"{key}: {value}" for key, value in sorted(scores.provenance.items()) if key != "calibration"),
        "",
        *(f"{site:<17} {place}" for site, place in scores.sites.items()),
    ]
    if (depth := scores.depth) is not None:
        lines.append(f"{'depth':<17} {', '.join(depth.metrics)}; blocks of {to_ranges(depth.lengths)} layers")
    influence = scores.block_influence().tolist()
    widest = max(*influence, 1e-12)
    lines += ["", "layer  block influence"]
    lines += [f"{layer:5}  {value:<8.4f} {'#' * round(BARS * value / widest)}" for layer, value in enumerate(influence)]
    return "\n".join(line.rstrip() for line in lines)
