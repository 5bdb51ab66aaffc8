"""A recipe's search as one object: the space, the budgets, the shapes that fit, the candidates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nemo_minitron.arch.axes import PRUNABLE
from nemo_minitron.arch.families import family_named, nearest_family
from nemo_minitron.arch.families.hybrid import first_mamba
from nemo_minitron.arch.layer import PARTS, LayerSpec
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.run import ExportFormat, RunConfig
from nemo_minitron.config.sizes import LayerSizes, MultipleOf, TargetConfig
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.axes import Sizes, axes_of, layer_places, resized
from nemo_minitron.search.choose import Candidate, choose_candidates
from nemo_minitron.search.measures import Latency, Measure, limits, measures
from nemo_minitron.search.race import group_count, group_sizes
from nemo_minitron.search.space import Found, Space, find_shapes, make_space

ALWAYS = ("params", "non_embedding_params", "weight_memory", "kv_cache", "flops_per_token")
"""Measures that are shown of every candidate, limited or not."""


@dataclass(frozen=True, kw_only=True)
class SearchProblem:
    """What a search chooses from."""

    config: RunConfig
    space: Space
    found: Found
    limits: Mapping[str, float]
    """Upper limit of each budget."""
    measured: Mapping[str, Measure]
    """Each budget and each of `ALWAYS`."""
    candidates: list[Candidate]

    @property
    def trainings(self) -> list[DistillConfig]:
        """How a candidate is trained in each rung."""
        search = self.config.search
        return [search.race_training(self.config.distill, rung) for rung in range(len(search.rungs))]

    def spec(self, sizes: Sizes) -> ModelSpec:
        """A candidate's architecture; which layers stay is the plan's matter."""
        return resized(self.space.teacher, sizes)

    def groups(self, tasks: int, ranks: int) -> int:
        """How many groups of ranks share so many measurements; each can cut the batch into complete micro-batches."""
        config = self.config
        batch, parallel = config.distill.batch, config.parallel
        unit = parallel.ranks
        ranks = max(ranks // unit, 1) * unit  # what is left over is refused before a search begins
        sizes = group_sizes(ranks, unit, config.search.ranks_per_candidate or unit)
        copies = {size: size // parallel.model_parallel_size for size in sizes}
        fitting = [size for size in sizes if batch.global_batch_size % (batch.micro_batch_size * copies[size]) == 0]
        return group_count(tasks, ranks, fitting or sizes[:1])


def pose(config: RunConfig, teacher: ModelSpec, latency: Latency | None = None) -> SearchProblem:
    """Enumerate and filter what a recipe with budgets asks for.

    Args:
        config: The recipe.
        teacher: The model to prune; its layers of one kind are alike.
        latency: For budgets of latency.

    Raises:
        SearchError: Rules contradict each other, or no shape fits.
        SpecError: Layers of one kind differ.
    """
    target, search = config.target, config.search
    several = len(layer_places(axes_of(teacher))) > 1
    if search.layerwise is not None and (teacher.has_experts or several):
        raise SearchError(
            f"search.layerwise for a model with {'experts' if teacher.has_experts else 'layers of several kinds'}",
            rule="layers take smaller MLPs, fewer KV groups, or go",
            remedy="leave search.layerwise out",
        )
    teacher = replace(teacher, layers=tuple(layer.routed_to(target.top_k) for layer in teacher.layers))
    always = [*ALWAYS, *(["active_params"] if teacher.has_experts else [])]
    always += ["ssm_state", "memory"] if first_mamba(teacher) is not None else []
    space = make_space(search, target, teacher, config.parallel, _export_rule(config, teacher))
    upper = limits(target, teacher)
    found = find_shapes(
        space, measures(teacher, target.deployment, list(upper), latency), upper, tolerance=search.tolerance
    )
    measured = measures(teacher, target.deployment, list(dict.fromkeys([*upper, *always])), latency)
    candidates = choose_candidates(space, found, search.candidates, measured, upper)
    return SearchProblem(
        config=config, space=space, found=found, limits=upper, measured=measured, candidates=candidates
    )


def _export_rule(config: RunConfig, teacher: ModelSpec) -> Callable[[Mapping[str, Any]], Any] | None:
    """What an export to Hugging Face asks of sizes; see `Family.holds`."""
    holds = family_named(nearest_family(teacher)).holds
    return partial(holds, teacher) if holds is not None and ExportFormat.HF in config.export.formats else None


def sized_target(target: TargetConfig, sizes: Mapping[str, int]) -> TargetConfig:
    """A recipe's target with its budgets replaced by sizes, by their keys."""
    return target.model_copy(update={**dict.fromkeys(target.budgets), **sizes})


def target_by_layer(target: TargetConfig, teacher: ModelSpec, layers: Mapping[int, LayerSpec]) -> TargetConfig:
    """A recipe's target with its budgets replaced by the parts and sizes of each layer that stays; all channels stay.

    Args:
        target: With budgets.
        teacher: The model to prune.
        layers: By number in the teacher, those that stay.
    """
    changed = {
        number: {name: size for name, size in layer.sizes.items() if size != teacher.layers[number].sizes[name]}
        for number, layer in layers.items()
    }
    dropped = tuple(number for number in range(teacher.num_layers) if number not in layers)
    every_layer = dict.fromkeys([*target.budgets, *(row.size for row in PRUNABLE)])
    gone = {
        part: tuple(
            number
            for number, layer in layers.items()
            if getattr(layer, part) is None and getattr(teacher.layers[number], part) is not None
        )
        for part in PARTS
    }
    own = {
        "drop_layers": dropped or None,
        "drop_mixers": gone["mixer"] or None,
        "drop_feed_forwards": gone["feed_forward"] or None,
        "by_layer": {number: LayerSizes(**sizes) for number, sizes in changed.items() if sizes},
        "multiple_of": MultipleOf(),
    }
    return target.model_copy(update=every_layer | own)
