"""The pipeline as a table: every stage, what it reads, and which keys of the recipe it depends on, in order."""

from nemo_minitron.stages.base import Stage, lazy

_STAGES = "nemo_minitron.stages."

CHAIN: tuple[Stage, ...] = (
    Stage(
        name="import",
        run=lazy(_STAGES + "import_:run"),
        title="Read the model into a checkpoint folder.",
        sections=("model",),
    ),
    Stage(
        name="data",
        run=lazy(_STAGES + "data:run"),
        title="Turn texts into token files with the model's own tokenizer.",
        needs=("import",),
        sections=("data", "seed"),
    ),
    Stage(
        name="score",
        run=lazy(_STAGES + "score:run"),
        title="Measure the importance of layers, channels, neurons and heads.",
        needs=("import", "data"),
        sections=("score", "precision"),
        collective=True,
    ),
    Stage(
        name="prune",
        run=lazy(_STAGES + "prune:run"),
        title="Decide what stays, and cut the rest out.",
        needs=("import", "score"),
        sections=("target",),
    ),
    Stage(
        name="distill",
        run=lazy(_STAGES + "distill:run"),
        title="Train the student on the teacher's predictions.",
        needs=("import", "data", "prune"),
        sections=("distill", "precision", "seed"),
        collective=True,
        saves_when_stopped=True,
    ),
    Stage(
        name="evaluate",
        run=lazy(_STAGES + "evaluate:run"),
        title="Measure perplexity on held-out text, and let each model write a sample.",
        needs=("import", "data", "prune", "distill"),
        sections=("evaluate", "precision"),
        collective=True,
    ),
    Stage(
        name="export",
        run=lazy(_STAGES + "export:run"),
        title="Write the student as .nemo and Hugging Face, and check what was written.",
        needs=("import", "data", "distill"),
        sections=("export", "name"),
        collective=True,
    ),
    Stage(
        name="report",
        run=lazy(_STAGES + "report:run"),
        title="Put figures and numbers into one HTML file.",
        needs=("import", "data", "score", "prune", "distill", "evaluate", "export"),
        sections=("name",),
    ),
)

NAMES: tuple[str, ...] = tuple(stage.name for stage in CHAIN)
