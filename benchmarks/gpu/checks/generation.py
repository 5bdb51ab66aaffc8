"""Texts that are generated with remembered keys, values and states."""

from benchmarks.gpu import models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Outcome, check
from nemo_minitron.config.parallel import Precision
from nemo_minitron.megatron.build import build_chunks

NEEDS = ("megatron.core", "pydantic")
COUNT = 12


@check(order=47, seconds=15, limit=60, needs=NEEDS)
def generation_cache(bench: Bench) -> Outcome:
    """With a cache each kind of model writes what it writes without one, in fp32, for prompts of unequal lengths."""
    from nemo_minitron.evaluation.generate import generate

    here = models.start()
    prompts = [list(range(3, 40)), [5], [7, 11, 13]]
    same: dict[str, bool] = {}
    for kind in models.KINDS:
        chunks = build_chunks(models.small(bench, kind), here, Precision.FP32, trainable=False)
        models.fill(chunks, by_width=True)
        cached, plain = (generate(chunks, here, prompts, COUNT, use_cache=use) for use in (True, False))
        same[kind] = cached == plain
    told = ", ".join(f"{kind} {'equal' if equal else 'DIFFERS'}" for kind, equal in same.items())
    return Outcome(figure=told, ok=all(same.values()))
