"""From scores and wanted sizes to a plan: the decision, pure and the same on every machine."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.config.run import TargetConfig
from nemo_minitron.errors import PlanError, ScoresError
from nemo_minitron.ops.ranking import top_heads, top_indices
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan, narrowed
from nemo_minitron.pruning.scores import Scores


def student_spec(target: TargetConfig, teacher: ModelSpec) -> ModelSpec:
    """The architecture that a target asks for; needs no scores.

    None keeps the teacher's size. KV groups without heads given keep their heads each, so the number of heads follows.
    For layers of different sizes, which of them stay is known only with scores: the first ones are taken.

    Raises:
        PlanError: With every size that cannot be.
    """
    problems = list(_problems(target, teacher))
    if problems:
        raise PlanError(
            "target: " + "; ".join(problems),
            rule="a student is cut out of its teacher: no size grows, every KV group keeps as many heads as the others",
            remedy="change the sizes under target",
        )
    kept = _kept_layers(target, teacher)
    sizes = [teacher.layers[index] for index in kept or range(target.num_layers or teacher.num_layers)]
    layers = tuple(_student_layer(target, layer) for layer in sizes)
    return narrowed(teacher, target.hidden_size or teacher.hidden_size, layers, rescale_norms=target.rescale_norms)


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
    layers = _kept_layers(target, spec)
    if layers is None:
        layers = _indices(scores.block_influence(), target.num_layers or spec.num_layers)
    return PruningPlan(
        spec=spec,
        hidden=_indices(scores.hidden(**how), target.hidden_size or spec.hidden_size),
        layers=tuple(_layer_plan(scores, layer, _student_layer(target, spec.layers[layer]), how) for layer in layers),
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


def _student_layer(target: TargetConfig, layer: LayerSpec) -> LayerSpec:
    groups = target.num_query_groups or layer.num_query_groups
    heads = groups * (layer.num_attention_heads // layer.num_query_groups)
    return LayerSpec(
        num_attention_heads=target.num_attention_heads or heads,
        num_query_groups=groups,
        ffn_hidden_size=target.ffn_hidden_size or layer.ffn_hidden_size,
    )


def _kept_layers(target: TargetConfig, teacher: ModelSpec) -> tuple[int, ...] | None:
    """Layers that are decided without scores; None when they are to be ranked."""
    if target.drop_layers is None:
        return None
    return tuple(index for index in range(teacher.num_layers) if index not in set(target.drop_layers))


def _problems(target: TargetConfig, teacher: ModelSpec) -> Iterator[str]:
    for name, size in (("num_layers", teacher.num_layers), ("hidden_size", teacher.hidden_size)):
        wanted = getattr(target, name)
        if wanted is not None and not 1 <= wanted <= size:
            yield f"{name} = {wanted}, the teacher has {size}"
    if target.drop_layers is not None:
        yield from _drop_problems(target, teacher, list(target.drop_layers))
    for sizes in dict.fromkeys(teacher.layers):
        yield from _layer_problems(target, sizes)


def _drop_problems(target: TargetConfig, teacher: ModelSpec, dropped: list[int]) -> Iterator[str]:
    if len(set(dropped)) < len(dropped):
        yield f"drop_layers names a layer twice: {dropped}"
    if outside := [index for index in dropped if not 0 <= index < teacher.num_layers]:
        yield f"drop_layers = {outside}: the teacher's layers are 0-{teacher.num_layers - 1}"
    left = teacher.num_layers - len(set(dropped))
    if left < 1:
        yield "drop_layers leaves zero layers; at least 1 must stay"
    if target.num_layers not in (None, left):
        yield f"num_layers = {target.num_layers}, but drop_layers leaves {left}"


def _layer_problems(target: TargetConfig, sizes: LayerSpec) -> Iterator[str]:
    for name in ("ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        wanted, size = getattr(target, name), getattr(sizes, name)
        if wanted is not None and not 1 <= wanted <= size:
            yield f"{name} = {wanted}, the teacher has {size}"
    groups = target.num_query_groups or sizes.num_query_groups
    per_group = sizes.num_attention_heads // sizes.num_query_groups
    heads = target.num_attention_heads
    if heads is None or groups > sizes.num_query_groups:
        return
    if heads % groups:
        yield f"num_attention_heads = {heads} is not a multiple of num_query_groups = {groups}"
    elif heads > groups * per_group:
        yield f"num_attention_heads = {heads}, but {groups} KV groups have {groups * per_group} heads"


def _provenance(scores: Scores, target: TargetConfig) -> dict[str, Any]:
    return {
        "target": target.model_dump(mode="json"),
        "scores": {"samples": scores.samples, "tokens": scores.tokens, **scores.provenance},
    }
