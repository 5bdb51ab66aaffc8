"""The layer-wise part of a search: the loss of replacing each layer alone, and the choice that it leads to."""

from typing import Any

import numpy as np

from nemo_minitron.arch.layer import PARTS, LayerSpec
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.sizes import LayerwiseConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.megatron.replace import BlockLossCollector, Replacement
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.pruning.build import build_plan_by_layer
from nemo_minitron.pruning.plan import PruningPlan, axes_of
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.search.layerwise import Variant, choose_layers, layer_costs, layer_variants
from nemo_minitron.search.problem import SearchProblem
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.files import read_json, write_json
from nemo_minitron.stages.session import make_trainer, restore

NAME = "layerwise"
FILE = "block_losses.json"


def layerwise_plan(context: StageContext, problem: SearchProblem, scores: Scores) -> PruningPlan:
    """The plan whose layers have the sizes that cost least. Collective.

    Raises:
        SearchError: Even the smallest layers exceed a budget.
    """
    teacher, target = problem.space.teacher, context.config.target
    settings, forms = _forms(context, teacher)
    losses = np.array(_block_losses(context, teacher, scores, forms, settings))
    costs, fixed = layer_costs(problem.space, forms, problem.measured, problem.limits)
    parallel = context.config.parallel
    chosen = choose_layers(
        losses,
        costs,
        {name: limit - fixed[name] for name, limit in problem.limits.items()},
        dropped=forms.index(None) if None in forms else None,
        least_layers=parallel.pipeline * (parallel.virtual_pipeline or 1),
    )
    layers: dict[int, LayerSpec] = {}
    for number, form in enumerate(chosen):
        if (sizes := forms[form]) is not None:
            local = teacher.layers[number].local
            layers[number] = sizes.looking_back(local=local) if sizes.mixer is not None else sizes
    provenance = {"search": "layerwise", "expected_rise": float(losses[np.arange(len(chosen)), chosen].sum())}
    return build_plan_by_layer(scores, target, layers, provenance=provenance)


def check_forms(context: StageContext, teacher: ModelSpec) -> None:
    """Whether a search that goes on gives layers the forms that were measured before it was stopped. Collective.

    Raises:
        SearchError: `parallel.tensor` rounds their sizes to others.
    """
    kept = _kept(context)
    if kept is None or kept["forms"] == [_told(form) for form in _forms(context, teacher)[1]]:
        return
    raise SearchError(
        f"search.layerwise: {FILE} of the attempt before was measured for other sizes of layers than those of "
        f"parallel.tensor = {context.config.parallel.tensor}",
        rule="sizes are rounded to multiples of parallel.tensor, and a search compares one set of them",
        remedy="go on with the parallel sizes of the attempt before, or begin again: `nemo-minitron search --redo`",
    )


def _forms(context: StageContext, teacher: ModelSpec) -> tuple[LayerwiseConfig, list[Variant]]:
    config = context.config
    settings = config.search.layerwise
    assert settings is not None, "asked for only with its section"
    return settings, layer_variants(settings, config.target, teacher.layer, config.parallel)


def _kept(context: StageContext) -> dict[str, Any] | None:
    """What an earlier attempt measured, on every rank."""
    path = context.out / FILE
    found: dict[str, Any] | None = megatron_runtime.broadcast_object(
        read_json(path) if context.rank == 0 and path.is_file() else None
    )
    return found


def _block_losses(
    context: StageContext, teacher: ModelSpec, scores: Scores, forms: list[Variant], settings: LayerwiseConfig
) -> list[list[float]]:
    """Rise of the loss, nats per token, for every layer and form; kept in a file for the next attempt."""
    if (kept := _kept(context)) is not None:
        return [[float(value) for value in row] for row in kept["rise"]]
    replacements = [
        (layer, form, _replacement(context, scores, layer, sizes))
        for layer in range(teacher.num_layers)
        for form, sizes in enumerate(forms)
        if form > 0
    ]
    context.reporter.line(f"          measuring {len(replacements)} replacements of one layer")
    base, *measured = _measure(context, teacher, [each for *_, each in replacements], settings)
    rise = [[0.0] * len(forms) for _ in range(teacher.num_layers)]
    for (layer, form, _), loss in zip(replacements, measured, strict=True):
        rise[layer][form] = loss - base
    if context.rank == 0:
        write_json(context.out / FILE, {"base": base, "forms": [_told(form) for form in forms], "rise": rise})
    return rise


def _replacement(context: StageContext, scores: Scores, layer: int, sizes: Variant) -> Replacement:
    if sizes is None:
        return Replacement(layer=layer, dropped=True)
    plan = build_plan_by_layer(scores, context.config.target, {layer: sizes}, provenance={})
    (chosen,), before = plan.layers, scores.spec.layers[layer]
    cut = {row.axis: chosen.kept[row.axis] for row in axes_of(sizes) if sizes.size(row) < before.size(row)}
    return Replacement(layer=layer, kept=cut, without=chosen.without)


def _measure(
    context: StageContext, teacher: ModelSpec, replacements: list[Replacement], settings: LayerwiseConfig
) -> list[float]:
    config, batch = context.config, context.config.distill.batch
    trainer = make_trainer(config)
    model = restore(
        MegatronGPTModel,
        context.input("model"),
        config=config,
        micro_batch_size=batch.micro_batch_size,
        trainer=trainer,
    )
    model.requires_grad_(False).eval()
    collector = BlockLossCollector(model.chunks, model.runtime, teacher, replacements)
    windows = WindowDataset(context.input("data"), "calibration", batch.sequence_length, settings.samples, spread=True)
    collector.add_all(windows, micro_batch_size=batch.micro_batch_size)
    return collector.losses()


def _told(form: Variant) -> dict[str, Any]:
    if form is None:
        return {"dropped": True}
    absent = [part for part in PARTS if getattr(form, part) is None]
    return {**form.sizes, **({"without": absent} if absent else {})}
