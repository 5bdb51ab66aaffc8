"""The demo on the card: SmolLM2-135M to 102M, from the recipe to perplexities."""

import re

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.recipe_run import Finished, run_recipe
from benchmarks.gpu.registry import Kind, Outcome, Target, UnavailableError, check
from benchmarks.gpu.runner import ROOT

RECIPE = ROOT / "recipes" / "smollm2" / "demo.yaml"
NEEDS = ("megatron.core", "pydantic", "nemo.core", "lightning", "transformers", "gguf")
LIMIT = 200


def _demo(bench: Bench, precision: str) -> Outcome:
    import yaml

    from nemo_minitron.data.assets import location

    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    absent = [uri for uri in (recipe["model"]["source"], *recipe["data"]["sources"]) if not location(uri).exists()]
    if absent:
        raise UnavailableError(f"needs {', '.join(uri.partition('#')[0] for uri in absent)} in the cache folder")
    if bench.tiny:
        raise UnavailableError("takes ten minutes on a CPU: make demo")
    on_cpu, tokens = published()
    settings = [f"precision={precision}", f"distill.tokens={tokens}"]
    found = run_recipe(["demo", *settings], bench.folder() / "run", limit=LIMIT - 10)
    return outcome(precision, found, on_cpu)


def outcome(precision: str, found: Finished, on_cpu: float) -> Outcome:
    """A demo's student against the one that a CPU made, whose perplexity was `on_cpu`."""
    apart = abs(found.perplexity["distilled"] / on_cpu - 1)
    target = Target(name=f"student, against {on_cpu:g} on the CPU", wanted="within 2 %", found=apart, met=apart <= 0.02)
    return Outcome(figure=f"{precision}: {found.told}", figures={"summary": found.summary}, targets=(target,))


def published() -> tuple[float, int]:
    """The student's perplexity on a CPU, and the tokens it was distilled on, from the table in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| \*\*pruned and distilled\*\* on ([\d,]+) tokens.*$", readme, re.MULTILINE)
    assert row is not None, "the README has a table of perplexities"
    return float(row[0].split("|")[3].strip(" *")), int(row[1].replace(",", ""))


@check(order=90, seconds=90, limit=LIMIT, kind=Kind.SPEED, needs=NEEDS)
def demo_bf16(bench: Bench) -> Outcome:
    """The demo in bf16: every stage, and its perplexities."""
    return _demo(bench, "bf16")


@check(order=91, seconds=90, limit=LIMIT, kind=Kind.SPEED, needs=NEEDS)
def demo_fp32(bench: Bench) -> Outcome:
    """The demo in fp32: every stage, and its perplexities."""
    return _demo(bench, "fp32")
