"""The pipeline as a function of the recipe: every stage, what it reads, and which keys it depends on, in order.

With `rounds: 3` the stages score, prune and distill come three times. Those of the earlier rounds are called `score.1`,
`prune.1`, `distill.1`, `score.2` and so on; the last round's have the plain names, so that `distill` is where the
finished student comes from, whatever the recipe.
"""

from typing import TYPE_CHECKING, Any

from nemo_minitron.stages.base import Stage, lazy

if TYPE_CHECKING:  # pydantic takes longer to import than the command line may take to answer --help
    from nemo_minitron.config.run import RunConfig

TITLES: dict[str, str] = {
    "import": "Read the model into a checkpoint folder.",
    "data": "Turn texts into token files with the model's own tokenizer.",
    "tokenize_chat": "Turn conversations into token files that know the answers, if the recipe tunes on them.",
    "correct": "Fine-tune the teacher on the distillation data first, if the recipe asks for it.",
    "score": "Measure the importance of layers, channels, neurons and heads.",
    "search": "Find the best sizes within a budget, if the target names one.",
    "prune": "Decide what stays, and cut the rest out.",
    "cache": "Store the teacher's targets, if the recipe asks for it, so that students need no teacher.",
    "distill": "Train the student on the teacher's predictions.",
    "tune": "Fine-tune the student on the answers of conversations, if the recipe asks for it.",
    "evaluate": "Measure perplexity, benchmark tasks and speed, and let each model write a sample.",
    "export": "Write the student as .nemo and Hugging Face, and check what was written.",
    "report": "Put figures and numbers into one HTML file.",
}
"""Every stage that a recipe can have, in order, and the help text of its verb."""

MODELS = ("teacher", "pruned", "distilled", "tuned")
"""What stage evaluate reads, by role: the models it compares, in order."""

_CHAT_KEYS = (
    *(f"tune.{key}" for key in ("sources", "prompt_key", "answer_key", "validation_fraction", "too_long")),
    "tune.batch.sequence_length",
    "data.parse_special_tokens",
    "seed",
)

_DATA_KEYS = (
    *(f"data.{key}" for key in ("sources", "text_key", "calibration_fraction", "heldout_fraction", "min_characters")),
    *(f"data.{key}" for key in ("parse_special_tokens", "blend", "calibration_blend", "heldout_blend")),
    "data.reset_attention_mask",
    "seed",
)
"""Not `workers` and `max_bad_fraction`, which change nothing in the token files."""

_CACHE_KEYS = (
    *(f"cache.{key}" for key in ("kind", "draws", "k", "samples_per_shard", "folder")),
    *(f"distill.{key}" for key in ("tokens", "temperature", "batch.sequence_length", "batch.global_batch_size")),
    "precision",
    "seed",
)

_SEARCH_KEYS = ("search", "target", "distill", "export.formats", "precision", "seed")

ROUND = ("score", "prune", "distill")
"""The stages that `rounds` repeats."""


def chain_for(config: "RunConfig") -> tuple[Stage, ...]:
    """The stages of a recipe, in order."""
    teacher = "import/teacher"
    stages = [
        _stage("import", sections=("model.source",)),
        _stage(
            "data",
            inputs={"teacher": teacher},
            sections=_DATA_KEYS,
            help=lazy("nemo_minitron.stages.data:help_tokenize"),
            changed=lazy("nemo_minitron.stages.sources:changed"),
        ),
    ]
    if config.tune is not None:
        stages.append(_stage("tokenize_chat", inputs={"teacher": teacher}, sections=_CHAT_KEYS))
    if config.correct is not None:
        stages.append(
            _stage(
                "correct",
                inputs={"model": teacher, "data": "data"},
                sections=("correct", "precision", "seed"),
                collective=True,
                saves_when_stopped=True,
            )
        )
        teacher = "correct/teacher"
    model = teacher
    for number in range(1, config.rounds + 1):
        stages += _round(number, config, teacher=teacher, model=model)
        model = f"{stages[-1].name}/student"
    models = {"teacher": teacher, "pruned": "prune/student", "distilled": "distill/student"}
    if config.tune is not None:
        stages.append(
            _stage(
                "tune",
                inputs={"student": model, "tokenize_chat": "tokenize_chat", "teacher": teacher},
                sections=("tune", "precision", "seed"),
                collective=True,
                saves_when_stopped=True,
            )
        )
        models["tuned"] = model = "tune/student"
    stages += [
        _stage("evaluate", inputs={**models, "data": "data"}, sections=("evaluate", "precision"), collective=True),
        _stage("export", inputs={"student": model, "data": "data"}, sections=("export", "name"), collective=True),
    ]
    everything = tuple(stage.name for stage in stages)
    return (*stages, _stage("report", needs=everything, sections=("name",)))


def round_name(stage: str, number: int, rounds: int) -> str:
    """What a stage of round `number` (from 1) of `rounds` is called."""
    return stage if number == rounds else f"{stage}.{number}"


def _round(number: int, config: "RunConfig", *, teacher: str, model: str) -> list[Stage]:
    """Score and prune the model that has come so far, then teach the result with the original teacher."""
    score, prune, cache, distill = (
        round_name(stage, number, config.rounds) for stage in (*ROUND[:2], "cache", ROUND[2])
    )
    lesson = {"teacher": teacher} if config.cache is None else {"cache": f"{cache}/targets"}
    merging, searching = config.target.merge_layers, bool(config.target.budgets)
    scored = {"model": model, "scores": f"{score}/scores.safetensors", "teacher": teacher}
    working: dict[str, Any] = {"round": number, "collective": True, "saves_when_stopped": True}
    stages = [
        _stage(
            score,
            inputs={"model": model, "data": "data", **({"teacher": teacher} if merging else {})},
            sections=("score", "precision", *(("target", "rounds") if merging else ())),
            **working,
        )
    ]
    if searching:
        stages.append(
            _stage("search", inputs={**scored, "data": "data"}, sections=_SEARCH_KEYS, round=number, collective=True)
        )
    stages.append(
        _stage(
            prune,
            inputs={**scored, **({"plan": "search/plan.json"} if searching else {})},
            sections=("target", "rounds"),
            round=number,
        )
    )
    if config.cache is not None:
        stages.append(
            _stage(cache, inputs={"teacher": teacher, "data": "data"}, sections=_CACHE_KEYS, **working),
        )
    stages.append(
        _stage(
            distill,
            inputs={**lesson, "data": "data", "student": f"{prune}/student"},
            sections=("distill", "precision", "seed"),
            **working,
        )
    )
    return stages


def _stage(name: str, **settings: Any) -> Stage:
    kind = name.partition(".")[0]
    module = f"nemo_minitron.stages.{'import_' if kind == 'import' else kind}"
    return Stage(name=name, run=lazy(f"{module}:run"), title=TITLES[kind], **settings)
