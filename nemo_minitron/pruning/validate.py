"""What is wrong with a plan's indices, all of it."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from nemo_minitron.arch.spec import LayerSpec
from nemo_minitron.pruning import mixes

if TYPE_CHECKING:
    from nemo_minitron.pruning.plan import LayerPlan, PruningPlan


def problems_of(plan: "PruningPlan") -> Iterator[str]:
    """One sentence a problem; none for a sound plan."""
    spec = plan.spec
    if not plan.layers:
        yield "zero layers; at least 1 must stay"
    sources = tuple(layer.source for layer in plan.layers)
    if plan.layers and (problem := _index_problem(sources, spec.num_layers)):
        yield f"layers: {problem}"
        return
    if problem := _index_problem(plan.hidden, spec.hidden_size):
        yield f"hidden: {problem}"
    if plan.norm_scale is not None and min(plan.norm_scale) < 1:
        yield f"norm_scale: {plan.norm_scale} is no ratio of channels"
    for layer in plan.layers:
        yield from (f"layer {layer.source}: {problem}" for problem in _layer_problems(layer, spec.layers[layer.source]))


def _layer_problems(layer: "LayerPlan", sizes: LayerSpec) -> list[str]:
    axes = {
        "kv_groups": (layer.kv_groups, sizes.num_query_groups),
        "heads": (layer.heads, sizes.num_attention_heads),
        "ffn": (layer.ffn, sizes.ffn_hidden_size),
    }
    problems = [f"{name}: {found}" for name, axis in axes.items() if (found := _index_problem(*axis))]
    if problems:
        return problems
    for axis, merged in (("kv_groups", layer.merged_groups), ("heads", layer.merged_heads)):
        kept, size = axes[axis]
        problems += [f"merged {axis}: {problem}" for problem in mixes.problems_of(merged, kept=kept, size=size)]
    return problems or _head_problems(layer, sizes)


def _index_problem(indices: tuple[int, ...], size: int) -> str:
    if not indices:
        return "none are kept"
    if any(a >= b for a, b in pairwise(indices)):
        return "not ascending, or one index occurs twice"
    if indices[0] < 0 or indices[-1] >= size:
        return f"indices {indices[0]} to {indices[-1]} of {size}"
    return ""


def _head_problems(layer: "LayerPlan", sizes: LayerSpec) -> list[str]:
    per_group = sizes.num_attention_heads // sizes.num_query_groups
    counts = dict.fromkeys(layer.kv_groups, 0)
    for head in layer.heads:
        if head // per_group not in counts:
            return [f"head {head} stays, but its KV group {head // per_group} does not"]
        counts[head // per_group] += 1
    if empty := [group for group, count in counts.items() if not count]:
        return [f"KV group {empty[0]} stays without any of its heads"]
    if len(set(counts.values())) > 1:
        return [f"KV groups keep unequal numbers of heads: {counts}"]
    return []
