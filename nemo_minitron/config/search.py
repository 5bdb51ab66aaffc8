"""Settings of the search for the best architecture within a budget."""

import re
from typing import Self

from pydantic import model_validator

from nemo_minitron.config.base import Count, Fraction, Section, Steps, in_steps
from nemo_minitron.config.budget import BudgetConfig
from nemo_minitron.config.cache import CacheConfig, cache_problems
from nemo_minitron.config.distillation import RampTo
from nemo_minitron.config.sizes import LayerwiseConfig, SpaceConfig
from nemo_minitron.config.training import DistillConfig

_MIN_SHARE = 0.5


class RungConfig(Section):
    """One round of training: how many candidates, and how long each."""

    candidates: Count
    """The best ones of the round before."""
    tokens: Steps
    """Of each candidate's distillation, from the pruned weights; below 1, a fraction of `distill.tokens`."""


class SearchConfig(Section):
    """How stage `search` goes about it; it is a stage where `target` has a budget."""

    space: SpaceConfig = SpaceConfig()
    tolerance: Fraction = 0.05
    """A shape passes if it is within every budget and uses one of them to at least 1 - `tolerance`."""
    candidates: Count = 24
    """Shapes that are pruned and measured without training. If more pass, so many are chosen that differ most."""
    samples: Count = 8
    """Windows of the calibration split, at even distances, that every loss is measured on."""
    rungs: tuple[RungConfig, ...] = (RungConfig(candidates=12, tokens=0.01), RungConfig(candidates=4, tokens=0.02))
    """Rounds of successive halving. In the paper, rankings were stable after about 2 % of the distillation's tokens
    (1.8B of 94B; arXiv:2407.14679, figure 9)."""
    seeds: Count = 1
    """Orders of the training samples that the last rung is repeated with; the mean counts."""
    baselines: bool = False
    """Let the last rung also train the median candidate of the first rung, uniform scaling of all axes, and the shape
    that only drops layers (as wide as `space` and `target` allow)."""
    layerwise: LayerwiseConfig | None = None
    """Also try layers of different sizes in the last rung; `{}` for the defaults, nothing for layers of one size."""
    ranks_per_candidate: Count | None = None
    """Ranks that work on one candidate, at least; None for the fewest that the layout fits in (TP x PP x CP, more with
    EP). All others work on other candidates meanwhile. More of them share the batch and the optimizer's states; losses
    are the same."""
    cache: CacheConfig = CacheConfig()
    """The teacher's targets, stored once for all candidates."""

    @model_validator(mode="after")
    def _narrowing(self) -> Self:
        counts = [self.candidates, *(rung.candidates for rung in self.rungs)]
        if sorted(counts, reverse=True) != counts:
            shown = ", ".join(map(str, counts))
            raise ValueError(f"candidates of the search and of each rung are {shown}: none may be larger than before")
        return self

    def race_training(self, distill: DistillConfig, rung: int) -> DistillConfig:
        """How a candidate is trained in a rung: as `distill` says, for as many tokens, from cached targets.

        Losses of intermediate states and of routers, and ramps of the temperature, are left out: a cache has no such
        targets.
        """
        tokens = self.rungs[rung].tokens
        count = in_steps(tokens, distill.tokens or 0)
        ramp = RampTo(**{**distill.ramp_to.model_dump(), "temperature": None, "hidden_weight": None})
        changes = {
            "tokens": max(count, distill.batch.tokens_per_step),
            "minutes": None,
            "hidden": None,
            "router_weight": 0.0,
            "top_k": None,
            "ramp_to": ramp,
            "offload_teacher": False,
            "teacher_fp8": False,
            "teacher_precision": None,
            "patience": 0,
            "validate_every": 0,
            "checkpoint_every": 0,
        }
        return distill.model_copy(update=changes)


def search_problems(search: SearchConfig, target: BudgetConfig, distill: DistillConfig, rounds: int) -> list[str]:
    """What a recipe with a budget asks for that a search cannot give."""
    if not target.budgets:
        return []
    problems = []
    named = ", ".join(f"target.{name}" for name in target.budgets)
    if rounds > 1:
        problems.append(f"rounds = {rounds} with a budget ({named}): the search knows one round; give sizes instead")
    for name in ("drop_layers", "random_seed", "by_layer", "drop_mixers", "drop_feed_forwards"):
        if getattr(target, name, None) not in (None, {}):
            problems.append(f"target.{name} with a budget ({named}): the search chooses; give sizes instead")
    if getattr(target, "merge_layers", False):
        problems.append(
            f"target.merge_layers with a budget ({named}): stage score would have to know which layers go; search "
            "first, then run the recipe that it writes with merge_layers"
        )
    if search.cache.folder is not None:
        problems.append("search.cache.folder: the search keeps its cache in the run folder")
    problems += _latency_problems(search, target)
    if distill.tokens is None and any(rung.tokens < 1 for rung in search.rungs):
        problems.append("search.rungs: tokens as fractions need distill.tokens; with distill.minutes give numbers")
    elif search.rungs:
        training = search.race_training(distill, 0)
        found = cache_problems(search.cache, training, 1)
        problems += [re.sub(r"(?<![.\w])cache\.", "search.cache.", problem) for problem in found]
    return problems


def _latency_problems(search: SearchConfig, target: BudgetConfig) -> list[str]:
    """What a latency table cannot give."""
    problems = []
    ranks = target.deployment.tensor_parallel
    for name in (name for name in ("prefill_ms", "decode_ms") if name in target.budgets):
        if target.deployment.latency_table is None:
            problems.append(f"target.{name} needs target.deployment.latency_table (`nemo-minitron latency` makes one)")
        if ranks > 1:
            problems.append(
                f"target.{name} with target.deployment.tensor_parallel = {ranks}: latency is measured on one device; "
                "limit flops_per_token or weight_memory, or set tensor_parallel=1"
            )
        if search.layerwise is not None and search.layerwise.drop_parts:
            problems.append(f"target.{name} with search.layerwise.drop_parts: a table has no layers without a part")
    return problems
