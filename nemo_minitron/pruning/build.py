"""From scores and wanted sizes to a plan: the decision, pure and the same on every machine."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.config.run import TargetConfig
from nemo_minitron.errors import ScoresError
from nemo_minitron.ops.ranking import ranked, top_heads, top_indices
from nemo_minitron.pruning.chance import RandomImportance
from nemo_minitron.pruning.depth import kept_layers
from nemo_minitron.pruning.mixes import Mixes, residual_mixes
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.sizes import hidden_size, named_layers, num_layers, student_layer, student_spec


def build_plan(scores: Scores, target: TargetConfig, spec: ModelSpec) -> PruningPlan:
    """Keep what scores highest; ties go to the lower index.

    Layers are chosen first, by `target.depth_metric`, unless they are named. Hidden channels are ranked over the whole
    model, neurons in each layer, KV groups in each layer by the sum over their heads, query heads inside each kept
    group.

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
        layers = kept_layers(scores.block_influence(), scores.depth, target, num_layers(target, spec))
    return _plan(scores, layers, target, _provenance(scores, target))


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
    how = {"batch": target.batch_aggregation.value, "sequence": target.sequence_aggregation.value}
    plans = []
    for number in sorted(layers):
        sizes = layers[number]
        exact = target.model_copy(
            update={
                "ffn_hidden_size": sizes.ffn_hidden_size,
                "num_attention_heads": sizes.num_attention_heads,
                "num_query_groups": sizes.num_query_groups,
            }
        )
        plans.append(_layer_plan(scores, number, exact, how))
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
    layers = named_layers(target, spec) or _indices(lots.layers(), num_layers(target, spec))
    return _plan(lots, layers, target, {"target": target.model_dump(mode="json"), "random_seed": seed})


class _Importance(Protocol):
    """What a plan needs to know of units; higher is better."""

    spec: ModelSpec

    def hidden(self, *, batch: str, sequence: str) -> Tensor: ...

    def ffn(self, layer: int, *, batch: str, sequence: str) -> Tensor: ...

    def heads(self, layer: int, *, batch: str, sequence: str) -> Tensor: ...

    def kv_groups(self, layer: int, *, batch: str, sequence: str) -> Tensor: ...


def _plan(
    importance: _Importance, layers: tuple[int, ...], target: TargetConfig, provenance: dict[str, Any]
) -> PruningPlan:
    spec = importance.spec
    how = {"batch": target.batch_aggregation.value, "sequence": target.sequence_aggregation.value}
    return PruningPlan(
        spec=spec,
        hidden=_indices(importance.hidden(**how), hidden_size(target, spec)),
        layers=tuple(_layer_plan(importance, layer, target, how) for layer in layers),
        rescale_norms=target.rescale_norms,
        provenance=provenance,
    )


def _layer_plan(importance: _Importance, layer: int, target: TargetConfig, how: dict[str, str]) -> LayerPlan:
    teacher = importance.spec.layers[layer]
    sizes = student_layer(target, teacher)
    group_scores, head_scores = importance.kv_groups(layer, **how), importance.heads(layer, **how)
    groups = top_indices(group_scores, keep=sizes.num_query_groups)
    heads = top_heads(
        head_scores,
        groups=groups,
        num_groups=teacher.num_query_groups,
        heads_per_group=sizes.num_attention_heads // sizes.num_query_groups,
    )
    plan = LayerPlan(
        source=layer,
        kv_groups=_plain(groups),
        heads=_plain(heads),
        ffn=_indices(importance.ffn(layer, **how), sizes.ffn_hidden_size),
    )
    return _merging(plan, teacher, group_scores, head_scores) if target.merge_head_residuals else plan


def _merging(plan: LayerPlan, teacher: LayerSpec, group_scores: Tensor, head_scores: Tensor) -> LayerPlan:
    """Fold the residuals of a layer's dropped heads into kept ones (arXiv:2407.14679, section 2.3).

    Heads that share a key and value are merged with those they share it with, in their query weights. Heads with a key
    and value of their own are merged over the whole layer, in query, key and value weights. Output weights stay.
    """
    if teacher.num_attention_heads == teacher.num_query_groups:
        merged = residual_mixes(_plain(ranked(group_scores)), keep=len(plan.kv_groups))
        return replace(plan, merged_heads=merged, merged_groups=merged)
    size = teacher.num_attention_heads // teacher.num_query_groups
    keep = len(plan.heads) // len(plan.kv_groups)
    mixes: Mixes = ()
    for group in plan.kv_groups:
        order = ranked(head_scores[group * size : (group + 1) * size]) + group * size
        mixes += residual_mixes(_plain(order), keep=keep)
    return replace(plan, merged_heads=mixes)


def _indices(score: Tensor, keep: int) -> tuple[int, ...]:
    return _plain(top_indices(score, keep=keep))


def _plain(indices: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in indices.to(torch.int64))


def _provenance(scores: Scores, target: TargetConfig) -> dict[str, Any]:
    return {
        "target": target.model_dump(mode="json"),
        "scores": {"samples": scores.samples, "tokens": scores.tokens, **scores.provenance},
    }
