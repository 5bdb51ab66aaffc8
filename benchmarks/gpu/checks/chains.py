"""Small mixtures of experts and hybrids from import to report, on the card."""

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.recipe_run import run_recipe
from benchmarks.gpu.registry import Outcome, UnavailableError, check
from benchmarks.gpu.runner import ROOT

NEEDS = ("megatron.core", "pydantic", "nemo.core", "lightning", "transformers", "tokenizers", "tests.tiny")
LIMIT = 150


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
    recipe_file = ROOT / "recipes" / "tiny" / f"{recipe}.yaml"
    found = run_recipe(["run", str(recipe_file), *settings], folder / "run", limit=LIMIT - 10)
    ok = found.perplexity["distilled"] < found.perplexity["pruned"]
    return Outcome(figure=found.told, ok=ok, figures={"summary": found.summary, "s": found.seconds})


@check(order=48, seconds=45, limit=LIMIT, needs=NEEDS)
def chain_experts(bench: Bench) -> Outcome:
    """recipes/tiny/experts_cpu on the card: every stage, and a student that distillation makes better."""
    return _chain(bench, "experts_cpu")


@check(order=49, seconds=45, limit=LIMIT, needs=NEEDS)
def chain_hybrid(bench: Bench) -> Outcome:
    """recipes/tiny/hybrid_cpu on the card: every stage, and a student that distillation makes better."""
    return _chain(bench, "hybrid_cpu")
