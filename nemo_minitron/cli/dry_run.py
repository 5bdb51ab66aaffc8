"""`--dry-run`: what a recipe comes to, before anything is paid for. Reads the model's configuration; writes nothing."""

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.cli import preflight
from nemo_minitron.cli.job import Job
from nemo_minitron.config.load import to_yaml
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.stages.chain import MODELS, chain_for
from nemo_minitron.stages.plan import decide, select
from nemo_minitron.stages.run_folder import RunFolder

_ROWS: tuple[tuple[str, Callable[[ModelSpec], int]], ...] = (
    ("parameters", parameter_count),
    ("  without embeddings", lambda spec: parameter_count(spec, embeddings=False)),
    ("layers", lambda spec: spec.num_layers),
    ("hidden size", lambda spec: spec.hidden_size),
    ("FFN size", lambda spec: spec.layers[0].ffn_hidden_size),
    ("query heads", lambda spec: spec.layers[0].num_attention_heads),
    ("KV groups", lambda spec: spec.layers[0].num_query_groups),
    ("head size", lambda spec: spec.head_dim),
    ("vocabulary", lambda spec: spec.vocab_size),
)


def show(job: Job, *, console: Console) -> None:
    """Print the resolved recipe, the steps, the sizes and how they fit the layout.

    Raises:
        MinitronError: The recipe cannot run as it is.
    """
    config = job.config()
    console.print(Text(to_yaml(config).rstrip()), highlight=False)
    console.print()
    console.print(_stages(job, config))
    teacher = preflight.teacher_spec(config, RunFolder(job.folder(config)))
    if teacher is None:
        console.print(f"sizes: not known before {config.model.source.split('/')[0]} is fetched (stage import)")
    else:
        models = {"teacher": teacher, **_named(preflight.students(config, teacher))}
        console.print(Group(_sizes(models), _layout(models, config.parallel)))
    console.print(_training(config))
    if teacher is not None:
        preflight.check_models(models.values(), config)


def _named(students: Sequence[ModelSpec]) -> dict[str, ModelSpec]:
    """The model after each round; the last one is the student."""
    names = [f"round {number}" for number in range(1, len(students))]
    return dict(zip([*names, "student"], students, strict=True))


def _table(*headings: str, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _stages(job: Job, config: RunConfig) -> RenderableType:
    selected = select(chain_for(config), first=job.redo_from, last=job.last, only=job.only)
    folder = RunFolder(job.folder(config))
    steps = decide(selected, config, folder, redo_from=job.redo_from)
    actions = "  ".join(f"{step.stage.name}: {step.action}" for step in steps)
    return Group(Text(f"run folder {folder.path}", style="bold"), Text(actions), Text())


def _sizes(models: Mapping[str, ModelSpec]) -> RenderableType:
    table = _table("", *models, "kept", title="sizes")
    for label, size in _ROWS:
        sizes = [size(spec) for spec in models.values()]
        before, after = sizes[0], sizes[-1]
        style = "bold" if label == "parameters" else ("dim" if before == after else "")
        table.add_row(label, *(f"{value:,}" for value in sizes), f"{after / before:.1%}", style=style)
    return table


def _layout(models: Mapping[str, ModelSpec], parallel: ParallelConfig) -> RenderableType:
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    table = _table("a rank holds", "divided by", *models, title=_layout_title(parallel))
    for label, name in (
        ("query heads", "num_attention_heads"),
        ("KV groups", "num_query_groups"),
        ("FFN", "ffn_hidden_size"),
    ):
        sizes = (getattr(spec.layers[0], name) for spec in models.values())
        table.add_row(label, f"TP {parallel.tensor}", *(_share(size, parallel.tensor) for size in sizes))
    layers = (_layer_share(spec.num_layers, chunks) for spec in models.values())
    table.add_row("layers", f"{chunks} stage{'s' if chunks > 1 else ''}", *layers)
    return table


def _layout_title(parallel: ParallelConfig) -> str:
    sizes = f"TP {parallel.tensor} x PP {parallel.pipeline} x CP {parallel.context}"
    return f"layout {sizes} ({parallel.model_parallel_size} rank(s) a copy)"


def _share(size: int, ranks: int) -> Text:
    return (
        Text(f"{size // ranks:,}") if size % ranks == 0 else Text(f"{size} / {ranks} does not divide", style="bold red")
    )


def _layer_share(layers: int, chunks: int) -> Text:
    if layers < chunks:
        return Text(f"{layers} < {chunks}", style="bold red")
    least, more = divmod(layers, chunks)
    return Text(f"{least}-{least + 1}" if more else str(least))


def _training(config: RunConfig) -> RenderableType:
    score, batch = config.score, config.distill.batch
    copies = batch.global_batch_size / batch.micro_batch_size
    table = _table("work", "steps", "tokens a step", "tokens", title="work")
    for stage in chain_for(config):
        section = getattr(config, stage.kind, None)
        if stage.kind == "score":
            table.add_row(stage.name, "", "", f"<= {score.samples * score.sequence_length:,}")
        elif isinstance(section, TrainingConfig):
            each = section.batch.tokens_per_step
            table.add_row(stage.name, f"{section.steps:,}", f"{each:,}", f"{section.steps * each:,}")
        elif stage.kind == "evaluate":
            models = len(set(MODELS) & stage.inputs.keys())
            table.add_row(stage.name, "", "", f"<= {models} x {config.evaluate.max_tokens:,}")
    note = f"{copies:g} micro-batches a step, over the data-parallel ranks"
    return Group(table, Text(note, style="dim"))
