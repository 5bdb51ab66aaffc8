"""Plans for one layer, written as people say them: groups, heads, neurons."""

from dataclasses import replace
from typing import Any

from nemo_minitron.arch.axes import LAYER_AXES, Axis
from nemo_minitron.pruning.plan import LayerPlan

_KEYS = {row.plan: ("kept", row.axis) for row in LAYER_AXES} | {row.mixes: ("mixes", row.axis) for row in LAYER_AXES}


def layer_plan(source: int, **kept: Any) -> LayerPlan:
    """A layer's plan by the keys of a plan file, such as `kv_groups`, `heads`, `ffn`, `merged_heads`."""
    return changed(LayerPlan(source=source, kept={}), **kept)


def changed(plan: LayerPlan, *, source: int | None = None, **kept: Any) -> LayerPlan:
    """A copy with other indices, by the keys of a plan file."""
    fields: dict[str, dict[Axis, Any]] = {"kept": dict(plan.kept), "mixes": dict(plan.mixes)}
    for key, value in kept.items():
        name, axis = _KEYS[key]
        fields[name][axis] = value
    return replace(plan, source=plan.source if source is None else source, **fields)
