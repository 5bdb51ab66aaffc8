"""From scores and wanted sizes to a plan: the decision, pure and the same on every machine."""

from typing import Any

import torch
from torch import Tensor

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.config.run import TargetConfig
from nemo_minitron.errors import ScoresError
from nemo_minitron.ops.ranking import top_heads, top_indices
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.sizes import hidden_size, named_layers, num_layers, student_layer, student_spec


def build_plan(scores: Scores, target: TargetConfig, spec: ModelSpec) -> PruningPlan:
    """Keep what scores highest; ties go to the lower index.

    Layers are chosen first, by Block Influence, unless they are named. Hidden channels are ranked over the whole model,
    neurons in each layer, KV groups in each layer by the sum over their heads, query heads inside each kept group.

    Args:
        scores: Scores of `spec`.
        target: Wanted sizes, or the layers to drop, and aggregations.
        spec: The teacher.

    Raises:
        PlanError: A size that cannot be.
        ScoresError: The scores are another model's.
    """
    student_spec(target, spec)
    if scores.spec != spec:
        raise ScoresError(
            f"scores of another model (spec {scores.spec.digest()[:12]}, this model {spec.digest()[:12]})",
            rule="scores and model have the same architecture",
            remedy="score this model",
        )
    how = {"batch": target.batch_aggregation.value, "sequence": target.sequence_aggregation.value}
    layers = named_layers(target, spec)
    if layers is None:
        layers = _indices(scores.block_influence(), num_layers(target, spec))
    return PruningPlan(
        spec=spec,
        hidden=_indices(scores.hidden(**how), hidden_size(target, spec)),
        layers=tuple(_layer_plan(scores, layer, student_layer(target, spec.layers[layer]), how) for layer in layers),
        rescale_norms=target.rescale_norms,
        provenance=_provenance(scores, target),
    )


def _layer_plan(scores: Scores, layer: int, sizes: LayerSpec, how: dict[str, str]) -> LayerPlan:
    teacher = scores.spec.layers[layer]
    groups = top_indices(scores.kv_groups(layer, **how), keep=sizes.num_query_groups)
    heads = top_heads(
        scores.heads(layer, **how),
        groups=groups,
        num_groups=teacher.num_query_groups,
        heads_per_group=sizes.num_attention_heads // sizes.num_query_groups,
    )
    return LayerPlan(
        source=layer,
        kv_groups=_plain(groups),
        heads=_plain(heads),
        ffn=_indices(scores.ffn(layer, **how), sizes.ffn_hidden_size),
    )


def _indices(score: Tensor, keep: int) -> tuple[int, ...]:
    return _plain(top_indices(score, keep=keep))


def _plain(indices: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in indices.to(torch.int64))


def _provenance(scores: Scores, target: TargetConfig) -> dict[str, Any]:
    return {
        "target": target.model_dump(mode="json"),
        "scores": {"samples": scores.samples, "tokens": scores.tokens, **scores.provenance},
    }
