"""Tables of a dry run: sizes, layout, memory of a rank, work."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_minitron.arch.families.hybrid import first_mamba
from nemo_minitron.arch.sizes import PARAMETERS, layer_axes, named_sizes
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Recompute
from nemo_minitron.config.run import RunConfig
from nemo_minitron.estimate.communication import Split
from nemo_minitron.estimate.memory import RankMemory
from nemo_minitron.estimate.overlap import Exchange
from nemo_minitron.estimate.work import Work
from nemo_minitron.stages.base import Stage
from nemo_minitron.stages.chain import MODELS

_GB = 1e9


def sizes(models: Mapping[str, ModelSpec]) -> RenderableType:
    """Sizes of every model, and what the last one keeps of the first."""
    table = new_table("", *models, "kept", title="sizes")
    named = {name: named_sizes(spec) for name, spec in models.items()}
    for label in next(iter(named.values())):
        found = [each.get(label, 0) for each in named.values()]
        before, after = found[0], found[-1]
        style = "bold" if label == PARAMETERS else ("dim" if before == after else "")
        kept = f"{after / before:.1%}" if before else ""
        table.add_row(label, *(f"{value:,}" for value in found), kept, style=style)
    return table


def layout(
    models: Mapping[str, ModelSpec], config: RunConfig, *, ranks: int, on_meta: Mapping[str, Sequence[int]]
) -> RenderableType:
    """What a rank holds of every axis.

    `on_meta` has the parameters of each pipeline stage's rank by model; it is empty if they could not be built.
    """
    parallel = config.parallel
    copies = ranks / parallel.model_parallel_size
    axes = f"TP {parallel.tensor} x PP {parallel.pipeline} x CP {parallel.context} x DP {copies:g}"
    axes += f", EP {parallel.expert} of DP" if parallel.expert > 1 else ""
    title = f"layout: {ranks} rank{'s' if ranks > 1 else ''} = {axes}"
    table = new_table("a rank holds", "divided by", *models, title=title)
    for row in layer_axes(next(iter(models.values()))):
        if row.divided_by:
            ranks_of = getattr(parallel, row.divided_by)
            found = (spec.common_size(row) for spec in models.values())
            by = {"expert": "EP"}.get(row.divided_by, "TP")
            table.add_row(row.label, f"{by} {ranks_of}", *(_share(size, ranks_of) for size in found))
    table.add_row("vocabulary, padded", f"TP {parallel.tensor}", *(_vocabulary(s, parallel) for s in models.values()))
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    by = f"PP {parallel.pipeline}" + (f" x {parallel.virtual_pipeline}" if parallel.virtual_pipeline else "")
    table.add_row("layers", by, *(_layer_share(spec.num_layers, chunks) for spec in models.values()))
    length = config.distill.batch.sequence_length
    pieces = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    names = f"CP {parallel.context}" + (f" x TP {parallel.tensor}" if parallel.sequence_parallel else "")
    table.add_row("positions of a sample", names, *(_share(length, pieces) for _ in models))
    if not any(spec.has_experts for spec in models.values()):
        table.add_row("experts", "EP 1", *("none" for _ in models), style="dim")
    if on_meta:
        most = [f"{max(on_meta[name]):,}" if name in on_meta else "" for name in models]
        table.add_row("parameters, built on meta", "", *most, style="bold")
    return table


def memory(works: Mapping[str, Work], available: float | None) -> RenderableType:
    """Memory of the fullest rank of every training, and its activations under each kind of recomputation."""
    kinds = [field.name for field in fields(RankMemory)]
    table = new_table("GB per rank", *kinds, "total", title="")
    again = new_table("activations, total", *(f"recompute {kind}" for kind in Recompute), title="")
    for name, work in works.items():
        stage, most = fullest(work)
        label = name if len(work.memory()) == 1 else f"{name}, PP stage {stage}"
        style = "" if available is None or most.total <= available else "bold red"
        table.add_row(label, *(_gb(getattr(most, kind)) for kind in kinds), _gb(most.total), style=style)
        others = {kind: fullest(work, kind)[1] for kind in Recompute}
        cells = [
            Text(f"{_gb(held.activations)}, {_gb(held.total)}", style="bold" if _is(work, kind) else "")
            for kind, held in others.items()
        ]
        again.add_row(name, *cells)
    return Group(table, again)


def fullest(work: Work, recompute: Recompute | None = None) -> tuple[int, RankMemory]:
    """The pipeline stage whose ranks hold most, and what they hold."""
    stages = work.memory(recompute)
    stage = max(range(len(stages)), key=lambda index: stages[index].total)
    return stage, stages[stage]


def communication(works: Mapping[str, Work], config: RunConfig) -> RenderableType:
    """Seconds of a training step in which ranks exchange data, and in how many of them they compute meanwhile.

    Of the pipeline stage that waits longest.
    """
    splits = {"TP": Split.TENSOR, "PP": Split.PIPELINE, "DP": Split.DATA}
    splits |= {"EP": Split.EXPERT} if config.parallel.expert > 1 else {}
    has_mamba = any(work.model is not None and first_mamba(work.model) is not None for work in works.values())
    splits |= {"CP of\nMamba": Split.CONTEXT} if config.parallel.context > 1 and has_mamba else {}
    table = new_table("communication, s a step", *splits, "hidden", "not\nhidden", "of the\nstep", title="")
    for name, work in works.items():
        stages = work.communication(config)
        stage = max(range(len(stages)), key=lambda index: _exposed(stages[index]))
        found = stages[stage]
        label = name if len(stages) == 1 else f"{name}, PP stage {stage}"
        hidden, exposed = sum(each.hidden for each in found.values()), _exposed(found)
        axes = (_seconds(found[split].seconds) for split in splits.values())
        share = f"{exposed / (exposed + computing):.1%}" if (computing := _step_seconds(work, config)) else ""
        table.add_row(label, *axes, _seconds(hidden), _seconds(exposed), share)
    return table


def _exposed(exchanges: Mapping[Split, Exchange]) -> float:
    return sum(each.exposed for each in exchanges.values())


def _step_seconds(work: Work, config: RunConfig) -> float:
    """Of computation, bubble included; 0 for a time budget that is shorter than a step."""
    duration = work.duration(config)
    if duration is None or work.section is None or not work.tokens:
        return 0.0
    return duration.hours * 3600 * work.section.batch.tokens_per_step / work.tokens


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def work(stages: Sequence[Stage], works: Mapping[str, Work], config: RunConfig) -> RenderableType:
    """Steps, tokens and time of every stage that computes."""
    hours = ("hours", "GPU\nhours") if config.cluster is not None else ("PFLOP",)
    table = new_table("work", "steps", "tokens\na step", "tokens", "micro-\nbatches", "bubble", *hours, title="")
    for stage in stages:
        if stage.kind == "evaluate":
            models = len(set(MODELS) & stage.inputs.keys())
            table.add_row(stage.name, "", "", f"<= {models} x {_count(config.evaluate.max_tokens)}")
        if stage.name in works:
            table.add_row(stage.name, *_work_cells(works[stage.name], config))
    return table


def _work_cells(work: Work, config: RunConfig) -> list[str]:
    duration = work.duration(config)
    cost = [f"{work.flops / 1e15:,.3g}"] if duration is None else [_hours(duration.hours), _hours(duration.gpu_hours)]
    if work.section is None or work.training is None:
        return ["", "", f"<= {_count(work.tokens)}", "", "", *cost]
    each = work.section.batch.tokens_per_step
    micro_batches = work.training.step.micro_batches
    fixed = work.minutes is None
    return [
        f"{work.tokens // each:,}" if fixed else "measured",
        _count(each),
        _count(work.tokens) if fixed else f"of {work.minutes:g} min",
        f"{micro_batches:,}",
        f"{work.bubble:.1%}",
        *(cost if fixed else [""]),
    ]


def new_table(*headings: str, title: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title or None,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _share(size: int, ranks: int) -> Text:
    return (
        Text(f"{size // ranks:,}") if size % ranks == 0 else Text(f"{size} / {ranks} does not divide", style="bold red")
    )


def _vocabulary(spec: ModelSpec, parallel: ParallelConfig) -> str:
    from nemo_minitron.megatron.placement import padded_vocab

    return f"{padded_vocab(spec, parallel.tensor) // parallel.tensor:,}"


def _layer_share(layers: int, chunks: int) -> Text:
    if layers < chunks:
        return Text(f"{layers} < {chunks}", style="bold red")
    least, more = divmod(layers, chunks)
    return Text(f"{least}-{least + 1}" if more else str(least))


def _is(work: Work, recompute: Recompute) -> bool:
    return work.training is not None and work.training.step.parallel.recompute is recompute


def _gb(count: int) -> str:
    return f"{count / _GB:,.1f}" if count >= _GB / 10 else f"{count / _GB:.2g}"


def _hours(hours: float) -> str:
    form = next((form for least, form in ((10, ",.0f"), (0.1, ".1f"), (0.01, ".2g")) if hours >= least), None)
    return "<0.01" if form is None else format(hours, form)


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.4g}{letter}"
    return f"{number:,}"
