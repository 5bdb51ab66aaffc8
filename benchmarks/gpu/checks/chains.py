"""Small mixtures of experts and hybrids from import to report, on the card."""

import json
import os
import subprocess
import sys
import time

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Outcome, UnavailableError, check
from benchmarks.gpu.runner import ROOT

NEEDS = ("megatron.core", "pydantic", "nemo.core", "lightning", "transformers", "tokenizers", "tests.tiny")


def _chain(bench: Bench, recipe: str) -> Outcome:
    """A recipe's complete chain from a model that is made and trained for some steps here."""
    from tests.support.expert_models import write_experts
    from tests.tiny import write_corpus, write_nemotron_h

    if bench.tiny:
        raise UnavailableError("tests/integration does so on a CPU")
    folder = bench.folder()
    write_corpus(folder / "corpus")
    settings = [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]"]
    if recipe == "experts_cpu":
        write_experts(folder / "hf", "qwen2_moe", trained_steps=100)
        settings.append("distill.router_weight=0.2")
    else:
        write_nemotron_h(folder / "hf", trained_steps=60)
    command = [sys.executable, "-m", "nemo_minitron", "run", str(ROOT / "recipes" / "tiny" / f"{recipe}.yaml")]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *settings, "--run-dir", str(folder / "run")],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    seconds = time.perf_counter() - started
    found = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    perplexity = found["perplexity"]
    told = ", ".join(f"{name} {value:.2f}" for name, value in perplexity.items() if value is not None)
    ok = perplexity["distilled"] < perplexity["pruned"]
    return Outcome(figure=f"perplexity {told}; {seconds:.0f} s", ok=ok, figures={"summary": found, "s": seconds})


@check(order=48, seconds=45, limit=150, needs=NEEDS)
def chain_experts(bench: Bench) -> Outcome:
    """recipes/tiny/experts_cpu on the card: every stage, and a student that distillation makes better."""
    return _chain(bench, "experts_cpu")


@check(order=49, seconds=45, limit=150, needs=NEEDS)
def chain_hybrid(bench: Bench) -> Outcome:
    """recipes/tiny/hybrid_cpu on the card: every stage, and a student that distillation makes better."""
    return _chain(bench, "hybrid_cpu")
