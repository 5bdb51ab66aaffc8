"""From scores and wanted sizes to a plan: the decision, pure and the same on every machine."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_minitron.arch.axes import Axis, outer_axis
from nemo_minitron.arch.layer import PARTS, LayerSpec
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import ScoresError
from nemo_minitron.ops.ranking import ranked, top_heads, top_indices
from nemo_minitron.pruning.chance import RandomImportance
from nemo_minitron.pruning.depth import kept_layers, layer_values
from nemo_minitron.pruning.mixes import Mixes, residual_mixes
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan, axes_of
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.sizes import (
    chosen_layers,
    dropped_parts,
    hidden_size,
    kind_counts,
    named_layers,
    student_layer,
    student_spec,
)


def build_plan(scores: Scores, target: TargetConfig, spec: ModelSpec) -> PruningPlan:
    """Keep what scores highest; ties go to the lower index.

    Layers are chosen first, by `target.depth_metric`, over all of them or among those of each kind, unless they are
    named, then mixers and feed-forwards that go out of layers that stay, by `target.sublayer_metric`. Hidden channels
    are ranked over the complete model, neurons in each layer, KV groups in each layer by the sum over their heads,
    query heads inside each kept group, experts in each layer and neurons of experts inside each kept expert.

    Args:
        scores: Scores of `spec`.
        target: Wanted sizes, or the layers to drop, and aggregations. With a `random_seed`, scores have no say.
        spec: The teacher.

    Raises:
        PlanError: A size that cannot be.
        ScoresError: The scores are another model's, or lack the depth metric.
    """
    if target.random_seed is not None:
        return random_plan(target, spec, seed=target.random_seed)
    student_spec(target, spec)
    if scores.spec != spec:
        raise ScoresError(
            f"scores of another model (spec {scores.spec.digest()[:12]}, this model {spec.digest()[:12]})",
            rule="scores and model have the same architecture",
            remedy="score this model",
        )
    layers = named_layers(target, spec)
    if layers is None:
        influence = scores.block_influence()
        layers = chosen_layers(
            target,
            spec,
            lambda keep: kept_layers(influence, scores.depth, target, keep),
            _plain(ranked(layer_values(influence, scores.depth, target))) if kind_counts(target, spec) else (),
        )

    def ranked_parts(part: str, able: list[int]) -> list[int]:
        worth = scores.sublayers(part, target.sublayer_metric)
        best_first = ranked(torch.tensor([worth[layer] for layer in able], dtype=torch.float64))
        return [able[place] for place in reversed(_plain(best_first))]

    gone = dropped_parts(target, spec, layers, ranked_parts)
    return _plan(scores, layers, gone, target, _provenance(scores, target))


def build_plan_by_layer(
    scores: Scores, target: TargetConfig, layers: Mapping[int, LayerSpec], *, provenance: Mapping[str, Any]
) -> PruningPlan:
    """A plan with sizes of its own for every layer; all hidden channels stay.

    Args:
        scores: Which units of a layer stay.
        target: Aggregations, and how heads and norms are treated; its sizes have no say.
        layers: By number, the sizes of those that stay.
        provenance: Where the choice comes from.

    Raises:
        PlanError: A layer asks for more than it has.
    """
    how = _how(target)
    plans = []
    for number in sorted(layers):
        form, whole = layers[number], scores.spec.layers[number]
        exact = target.model_copy(update=form.sizes)
        gone = tuple(name for name in PARTS if getattr(form, name) is None and getattr(whole, name) is not None)
        plans.append(_layer_plan(scores, number, exact, how, gone))
    return PruningPlan(
        spec=scores.spec,
        hidden=tuple(range(scores.spec.hidden_size)),
        layers=tuple(plans),
        rescale_norms=target.rescale_norms,
        provenance=dict(provenance),
    )


def random_plan(target: TargetConfig, spec: ModelSpec, *, seed: int) -> PruningPlan:
    """A plan of the wanted sizes whose units are drawn by lot, the same for a seed on every machine.

    It is the baseline for scores: whatever importance cannot beat it is not importance. Layers are drawn too, unless
    `target.drop_layers` names them.

    Raises:
        PlanError: A size that cannot be.
    """
    student_spec(target, spec)
    lots = RandomImportance(spec, seed)
    drawn = lots.importance(Axis.LAYER)
    layers = named_layers(target, spec)
    if layers is None:
        layers = chosen_layers(target, spec, lambda keep: _indices(drawn, keep), _plain(ranked(drawn)))
    gone = dropped_parts(target, spec, layers, lots.ranked_parts)
    return _plan(lots, layers, gone, target, {"target": target.model_dump(mode="json"), "random_seed": seed})


class _Importance(Protocol):
    """What a plan needs to know of units; higher is better."""

    spec: ModelSpec

    def importance(
        self,
        axis: Axis,
        layer: int | None = None,
        *,
        batch: str,
        sequence: str,
        experts: str,
        kept: Mapping[Axis, Tensor] | None = None,
    ) -> Tensor: ...


def _how(target: TargetConfig) -> dict[str, Any]:
    """What a target says about how scores are read."""
    return {
        "batch": target.batch_aggregation.value,
        "sequence": target.sequence_aggregation.value,
        "experts": target.expert_metric.value,
    }


def _plan(
    importance: _Importance,
    layers: tuple[int, ...],
    gone: Mapping[int, tuple[str, ...]],
    target: TargetConfig,
    provenance: dict[str, Any],
) -> PruningPlan:
    spec = importance.spec
    how = _how(target)
    return PruningPlan(
        spec=spec,
        hidden=_indices(importance.importance(Axis.HIDDEN, **how), hidden_size(target, spec)),
        layers=tuple(_layer_plan(importance, layer, target, how, gone.get(layer, ())) for layer in layers),
        rescale_norms=target.rescale_norms,
        provenance=provenance,
    )


def _layer_plan(
    importance: _Importance, layer: int, target: TargetConfig, how: dict[str, Any], without: tuple[str, ...] = ()
) -> LayerPlan:
    teacher = importance.spec.layers[layer].without(*without)
    student = student_layer(target.for_layer(layer), teacher)
    scores: dict[Axis, Tensor] = {}
    kept: dict[Axis, Tensor] = {}
    for row in axes_of(teacher):
        keep, outer = student.units(row), outer_axis(row)
        scores[row.axis] = importance.importance(row.axis, layer, kept=kept, **how)
        kept[row.axis] = (
            top_indices(scores[row.axis], keep=keep)
            if outer is None
            else top_heads(
                scores[row.axis],
                groups=kept[outer.axis],
                num_groups=teacher.units(outer),
                heads_per_group=keep // student.units(outer),
            )
        )
    plan = LayerPlan(
        source=layer,
        kept={axis: _plain(indices) for axis, indices in kept.items()},
        top_k=target.top_k if teacher.has_experts else None,
        without=without,
    )
    return replace(plan, mixes=_mixes(plan, teacher, scores)) if target.merge_head_residuals else plan


def _mixes(plan: LayerPlan, teacher: LayerSpec, scores: Mapping[Axis, Tensor]) -> dict[Axis, Mixes]:
    """Fold the residuals of a layer's dropped heads into kept ones (arXiv:2407.14679, section 2.3).

    Heads that share a key and value are merged with those they share it with, in their query weights. Heads with a key
    and value of their own are merged over the complete layer, in query, key and value weights. Output weights stay.
    """
    found: dict[Axis, Mixes] = {}
    for row in axes_of(teacher):
        if (outer := outer_axis(row)) is None or not row.mixes:
            continue
        size = teacher.size(row) // teacher.size(outer)
        groups = plan.kept[outer.axis]
        if size == 1:
            found[row.axis] = found[outer.axis] = residual_mixes(_plain(ranked(scores[outer.axis])), keep=len(groups))
            continue
        mixes: Mixes = ()
        for group in groups:
            order = ranked(scores[row.axis][group * size : (group + 1) * size]) + group * size
            mixes += residual_mixes(_plain(order), keep=len(plan.kept[row.axis]) // len(groups))
        found[row.axis] = mixes
    return {axis: mixes for axis, mixes in found.items() if mixes}


def _indices(score: Tensor, keep: int) -> tuple[int, ...]:
    return _plain(top_indices(score, keep=keep))


def _plain(indices: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in indices.to(torch.int64))


def _provenance(scores: Scores, target: TargetConfig) -> dict[str, Any]:
    return {
        "target": target.model_dump(mode="json"),
        "scores": {"samples": scores.samples, "tokens": scores.tokens, **scores.provenance},
    }
