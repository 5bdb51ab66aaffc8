"""Settings of the search for the best architecture within a budget."""

import re
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from nemo_minitron.config.base import Count, Fraction, Section, Steps, in_steps
from nemo_minitron.config.budget import BudgetConfig
from nemo_minitron.config.cache import CacheConfig, cache_problems
from nemo_minitron.config.distillation import RampTo
from nemo_minitron.config.training import DistillConfig

_MIN_SHARE = 0.5


def _limit(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (whole or (isinstance(value, float) and 0 < value <= 1)):
        raise ValueError("an integer of at least 1, or a fraction of the teacher's size up to 1.0, such as 0.5")
    return value


Limit = Annotated[int | float, BeforeValidator(_limit)]
"""An integer: a size. A number up to 1.0: that fraction of the teacher's size."""


class AxisConfig(Section):
    """The sizes of one axis that the search may choose: a list, or every step from `min` to `max`."""

    values: tuple[Count, ...] | None = None
    min: Limit | None = None
    """Smallest size; None for half the teacher's."""
    max: Limit | None = None
    """Largest size; None for the teacher's, which belongs to the space even if it is no multiple of `step`."""
    step: Count | None = None
    """Sizes are multiples of it, and of `target.multiple_of`; None for the axis's own step (docs/search.md)."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.values is not None and any(x is not None for x in (self.min, self.max, self.step)):
            raise ValueError("values, or min, max and step; not both")
        if self.values is not None and not self.values:
            raise ValueError("values is empty")
        return self


def _axis(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"values": [value]}
    return {"values": value} if isinstance(value, list | tuple) else value


AxisSpace = Annotated[AxisConfig, BeforeValidator(_axis)]
"""Also a list of sizes, or one size."""


class SpaceConfig(Section):
    """What the search may choose from. A size that `target` names is fixed; an axis that neither names has defaults."""

    num_layers: AxisSpace | None = None
    hidden_size: AxisSpace | None = None
    ffn_hidden_size: AxisSpace | None = None
    num_attention_heads: AxisSpace | None = None
    """None keeps the teacher's heads, as the papers recommend (arXiv:2408.11796)."""
    num_query_groups: AxisSpace | None = None
    """None keeps the teacher's KV groups."""


class RungConfig(Section):
    """One round of training: how many candidates, and how long each."""

    candidates: Count
    """The best ones of the round before."""
    tokens: Steps
    """Of each candidate's distillation, from the pruned weights; below 1, a fraction of `distill.tokens`."""


class LayerwiseConfig(Section):
    """Sizes that differ from layer to layer, chosen by the loss of replacing each layer alone.

    Source: Puzzle, arXiv:2411.19146.
    """

    ffn_hidden_size: tuple[Limit, ...] = (1.0, 0.75, 0.5, 0.25)
    """FFN sizes that a layer may have."""
    num_query_groups: tuple[Limit, ...] = (1.0,)
    """KV groups that a layer may have; each keeps its query heads."""
    drop: bool = True
    """Whether a layer may go altogether."""
    samples: Count = 2
    """Calibration samples that each replacement is measured on."""


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
    that only drops layers."""
    layerwise: LayerwiseConfig | None = None
    """Also try layers of different sizes in the last rung; `{}` for the defaults, nothing for layers of one size."""
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

        Losses of intermediate states and ramps of the temperature are left out: a cache has no such targets.
        """
        tokens = self.rungs[rung].tokens
        count = in_steps(tokens, distill.tokens or 0)
        ramp = RampTo(**{**distill.ramp_to.model_dump(), "temperature": None, "hidden_weight": None})
        changes = {
            "tokens": max(count, distill.batch.tokens_per_step),
            "minutes": None,
            "hidden": None,
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


def search_problems(search: SearchConfig, target: BudgetConfig, distill: DistillConfig, steps: int) -> list[str]:
    """What a recipe with a budget asks for that a search cannot give."""
    if not target.budgets:
        return []
    problems = []
    named = ", ".join(f"target.{name}" for name in target.budgets)
    if steps > 1:
        problems.append(f"steps = {steps} with a budget ({named}): the search knows one round; give sizes instead")
    for name in ("drop_layers", "random_seed"):
        if getattr(target, name, None) is not None:
            problems.append(f"target.{name} with a budget ({named}): the search chooses; give sizes instead")
    if getattr(target, "merge_layers", False):
        problems.append(
            f"target.merge_layers with a budget ({named}): stage score would have to know which layers go; search "
            "first, then run the recipe that it writes with merge_layers"
        )
    if search.cache.folder is not None:
        problems.append("search.cache.folder: the search keeps its cache in the run folder")
    for name in ("prefill_ms", "decode_ms"):
        if name in target.budgets and target.deployment.latency_table is None:
            problems.append(f"target.{name} needs target.deployment.latency_table (`nemo-minitron latency` makes one)")
    if distill.tokens is None and any(rung.tokens < 1 for rung in search.rungs):
        problems.append("search.rungs: tokens as fractions need distill.tokens; with distill.minutes give numbers")
    elif search.rungs:
        training = search.race_training(distill, 0)
        found = cache_problems(search.cache, training, 1)
        problems += [re.sub(r"(?<![.\w])cache\.", "search.cache.", problem) for problem in found]
    return problems
