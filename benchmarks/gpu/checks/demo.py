"""The demo on the card: SmolLM2-135M to 102M, from the recipe to perplexities."""

import json
import os
import re
import subprocess
import sys
import time

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Kind, Outcome, Target, UnavailableError, check
from benchmarks.gpu.runner import ROOT

RECIPE = ROOT / "recipes" / "smollm2" / "demo.yaml"
NEEDS = ("megatron.core", "pydantic", "nemo.core", "lightning", "transformers", "gguf")


def _demo(bench: Bench, precision: str) -> Outcome:
    import yaml

    from nemo_minitron.data.assets import location

    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    absent = [uri for uri in (recipe["model"]["source"], *recipe["data"]["sources"]) if not location(uri).exists()]
    if absent:
        raise UnavailableError(f"needs {', '.join(uri.partition('#')[0] for uri in absent)} in the cache folder")
    if bench.tiny:
        raise UnavailableError("takes ten minutes on a CPU: make demo")
    folder = bench.folder() / "run"
    on_cpu, tokens = _published()
    settings = [f"precision={precision}", f"distill.tokens={tokens}"]
    command = [sys.executable, "-m", "nemo_minitron", "demo", "--run-dir", str(folder), *settings]
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    perplexities = {name: value for name, value in found["perplexity"].items() if value is not None}
    student = perplexities["student"]
    apart = abs(student / on_cpu - 1)
    target = Target(name=f"student, against {on_cpu:g} on the CPU", wanted="within 2 %", found=apart, met=apart <= 0.02)
    told = ", ".join(f"{name} {value:.2f}" for name, value in perplexities.items())
    seconds = time.perf_counter() - started
    return Outcome(
        figure=f"{precision}: perplexity {told}; {seconds:.0f} s", figures={"summary": found}, targets=(target,)
    )


def _published() -> tuple[float, int]:
    """The student's perplexity on a CPU, and the tokens it was distilled on, from the table in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| \*\*pruned and distilled\*\* on ([\d,]+) tokens.*$", readme, re.MULTILINE)
    assert row is not None, "the README has a table of perplexities"
    return float(row[0].split("|")[3].strip(" *")), int(row[1].replace(",", ""))


@check(order=90, seconds=90, limit=200, kind=Kind.SPEED, needs=NEEDS)
def demo_bf16(bench: Bench) -> Outcome:
    """The demo in bf16: every stage, and its perplexities."""
    return _demo(bench, "bf16")


@check(order=91, seconds=90, limit=200, kind=Kind.SPEED, needs=NEEDS)
def demo_fp32(bench: Bench) -> Outcome:
    """The demo in fp32: every stage, and its perplexities."""
    return _demo(bench, "fp32")
