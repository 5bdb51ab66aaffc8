"""How long the arithmetic of `python -m benchmarks.search` takes: ten million shapes filtered, and layers chosen."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.synthetic_llama import llama_8b
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.run import TargetConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.search.layerwise import choose_layers
from nemo_minitron.search.measures import limits, measures
from nemo_minitron.search.space import find_shapes, make_space

SPACE = {
    "num_layers": {"min": 16},
    "hidden_size": {"min": 2048, "step": 16},
    "ffn_hidden_size": {"min": 7168, "step": 16},
    "num_attention_heads": [8, 16, 24, 32],
    "num_query_groups": [2, 4, 8],
}
SPEC = llama_8b()
BUDGET = {
    "params": "4.5B",
    "weight_memory": "9GB",
    "kv_cache": "4GB",
    "flops_per_token": "9B",
    "deployment": {"batch_size": 8, "sequence_length": 4096},
}
LAYERS, FORMS = 32, 8


def filtering() -> dict[str, Any]:
    """Enumerate and filter more than ten million shapes of Llama-3.1-8B under four budgets."""
    target = TargetConfig(**BUDGET)
    space = make_space(SearchConfig(space=SPACE), target, SPEC, ParallelConfig())
    upper = limits(target, SPEC)
    measured = measures(SPEC, target.deployment, list(upper))
    seconds, found = _best(lambda: find_shapes(space, measured, upper, tolerance=0.05))
    return {"shapes": found.total, "possible": found.total - found.ruled_out, "fit": len(found.shapes), "s": seconds}


def choosing(seed: int) -> dict[str, Any]:
    """Choose one of eight forms for each of 32 layers under two budgets, half of what the largest forms cost.

    Losses are made up: deeper cuts cost more, layers differ by a random factor, and every number has some noise.
    """
    rng = np.random.default_rng(seed)
    kept = np.linspace(1, 0, FORMS)
    weight = rng.lognormal(sigma=1.0, size=(LAYERS, 1))
    losses = weight * (1 - kept) ** 1.5 * rng.lognormal(sigma=0.2, size=(LAYERS, FORMS))
    costs = {"params": 2.2e8 * kept, "kv_cache": 1.3e8 * np.ceil(4 * kept) / 4}
    budget = {name: LAYERS * cost.max() / 2 for name, cost in costs.items()}
    seconds, chosen = _best(lambda: choose_layers(losses, costs, budget, dropped=FORMS - 1))
    return {"seed": seed, "loss": float(losses[np.arange(LAYERS), chosen].sum()), "s": seconds}


def _best(work: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest of three runs, in seconds by the clock, and the result."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return round(min(seconds), 3), result


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="layer-wise choices (default: 5)")
    given = parser.parse_args()
    print(json.dumps({"machine": platform.processor() or platform.machine(), "numpy": np.__version__}))
    print(json.dumps({"filtering": filtering()}))
    for seed in range(given.seeds):
        print(json.dumps({"choosing": choosing(seed)}))


if __name__ == "__main__":
    main()
