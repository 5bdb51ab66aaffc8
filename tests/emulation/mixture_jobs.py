"""What ranks do with experts and Mamba on an emulated GPU machine; module-level functions that return plain numbers."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.emulation.jobs import own_layers, run_recipe
from tests.parallel import expert_jobs, hybrid_jobs
from tests.parallel.expert_jobs import ExpertScoreCase
from tests.parallel.hybrid_jobs import Measured
from tests.parallel.megatron_jobs import ALL_SPECS, EXPERT_SPECS, Case, train

PROMPTS = [[5, 17, 200, 3, 90, 7, 8, 9, 41], [12], [30, 31, 32, 33]]
COUNT = 10
"""Tokens to generate."""


def train_on_both(cases: list[Case]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each run on the engine's layers, and on the project's own."""
    engine = [train(case) for case in cases]
    with own_layers():
        return list(zip(engine, [train(case) for case in cases], strict=True))


def score_on_both(case: ExpertScoreCase) -> list[dict[str, torch.Tensor]]:
    found = expert_jobs.score_experts([case])
    with own_layers():
        return [*found, *expert_jobs.score_experts([case])]


def measure_on_both(folder: Path) -> list[Measured]:
    found = hybrid_jobs.measure(folder, ParallelConfig())
    with own_layers():
        return [found, hybrid_jobs.measure(folder, ParallelConfig())]


def run_on_own_layers(recipe: Path, overrides: list[str], run: Path, last: str) -> dict[str, Any]:
    with own_layers():
        return run_recipe(recipe, overrides, run, last)


def modules_of(cases: list[Case]) -> list[list[str]]:
    """Classes of the modules that a rank's part of a model is made of, and of what brings tokens to experts."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks

    found = []
    for case in cases:
        here = runtime.start(case.parallel, seed=0)
        chunks = build_chunks((ALL_SPECS | EXPERT_SPECS)[case.spec], here, case.precision)
        modules = [module for chunk in chunks for module in chunk.modules()]
        ways = [module.dispatcher for module in modules if hasattr(module, "dispatcher")]
        found.append(sorted({type(each).__name__ for each in (*modules, *ways)}))
        runtime.stop()
    return found


def generate_with_and_without_cache(folders: list[Path], parallel: ParallelConfig) -> list[dict[str, Any]]:
    """New tokens, and how many positions the first layer's mixer was given each time."""
    from nemo_minitron.config.model_settings import ModelSettings
    from nemo_minitron.evaluation.generate import generate
    from nemo_minitron.models.gpt import MegatronGPTModel

    found = []
    for folder in folders:
        model = MegatronGPTModel.restore_from(folder, settings=ModelSettings(parallel=parallel, seed=0))
        read: list[int] = []
        first = model.chunks[0].decoder.layers[0].self_attention
        handle = first.register_forward_pre_hook(partial(_count_positions, read), with_kwargs=True)
        texts = generate(model.chunks, model.runtime, PROMPTS, COUNT)
        handle.remove()
        plain = generate(model.chunks, model.runtime, PROMPTS, COUNT, use_cache=False)
        kind = type(first).__name__
        found.append({"texts": texts, "plain": plain, "read": read, "kind": kind, "left": first.cache})
    return found


def _count_positions(read: list[int], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    read.append((args[0] if args else kwargs["hidden_states"]).shape[0])
