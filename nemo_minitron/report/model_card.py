"""The model card that lies beside exported weights: what the model is, where it comes from, how well it does.

Only what is known is said; a fact that is missing leaves its line out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.open import HUB_NAME
from nemo_minitron.checkpoints.source import PLAN_FILE, TensorSource
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.report import markdown
from nemo_minitron.report.content import ReportContent
from nemo_minitron.report.measured import speed_note, speed_table, task_table
from nemo_minitron.report.serving import LLAMA_CPP, VLLM, objections
from nemo_minitron.version import __version__

CARD = "README.md"

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_UNTESTED = (
    "Only what this card shows was measured after the cut: how well the model still follows instructions, converses "
    "and refuses was not."
)
_PLAIN_TYPES = ("F32", "F16", "BF16")
"""Types of a GGUF file that are no quantisation."""
_ROLES = {"teacher": "base model", "pruned": "pruned, before training", "distilled": "distilled", "tuned": "fine-tuned"}
_PROMPT = "The history of the city begins"
_INSTEAD = {
    VLLM: " `vllm serve . --model-impl transformers` runs the class of `transformers` in place of its own; not tried.",
    LLAMA_CPP: "",
}
_SERVING = {
    VLLM: (
        " or newer, on a GPU. Its class takes the sizes in `config.json`; that was read in its source, and not run:\n\n"
        "```console\npip install vllm\nvllm serve .\n```"
    ),
    LLAMA_CPP: (
        ", LLAMA_CPP being its source folder:\n\n"
        "```console\npython LLAMA_CPP/convert_hf_to_gguf.py . --outfile model.gguf --outtype bf16\n```\n\n"
        "```python\nfrom llama_cpp import Llama  # pip install llama-cpp-python\n\n"
        f'print(Llama("model.gguf")("{_PROMPT}", max_tokens=40)["choices"][0]["text"])\n```'
    ),
}


@dataclass(frozen=True, kw_only=True)
class Making:
    """How a run made the model, as far as it is known."""

    recipe: str = ""
    """The resolved recipe as YAML."""
    objective: str = ""
    """The loss in words."""
    tokens: int | None = None
    """Tokens the student was trained on."""
    sources: tuple[str, ...] = ()
    """Where the texts came from."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """What stage evaluate returned."""
    checks: Mapping[str, float] = field(default_factory=dict)
    """Largest difference of logits by format, from reading back what was written."""
    content: ReportContent | None = None
    """The run, for the tables that its report has too."""


def model_card(
    source: TensorSource, *, name: str, library: str, archive: str = "", making: Making | None = None
) -> str:
    """A card in Markdown with YAML front matter, as Hugging Face reads it.

    Args:
        source: The model.
        name: What to call it.
        library: "transformers", "nemo" or "megatron".
        archive: Name of the `.nemo` file, if it lies in one.
        making: How it was made, if a run made it.
    """
    making = making or Making()
    plan = carried_plan(source)
    front = yaml.safe_dump(_front_matter(source, library, making, plan), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {_line(name)}", _introduction(source, plan)]
    for title, body in _sections(source, library, archive, making, plan):
        parts.append(f"## {title}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def carried_plan(source: TensorSource) -> PruningPlan | None:
    """What is left of the first teacher, if the model carries it.

    Raises:
        PlanError: The plan it carries is damaged.
    """
    content = source.tokenizer_files().get(PLAN_FILE)
    return None if content is None else PruningPlan.from_bytes(content, where=PLAN_FILE)


def _front_matter(source: TensorSource, library: str, making: Making, plan: PruningPlan | None) -> dict[str, Any]:
    lineage = source.lineage
    found: dict[str, Any] = {}
    base = str(lineage.get("base_model") or "")
    if HUB_NAME.fullmatch(base):
        found["base_model"] = base
    licence = str(lineage.get("license") or "").lower()
    if _LICENCE.fullmatch(licence):
        found["license"] = licence
    elif licence:
        found |= {"license": "other", "license_name": _line(licence)}
    found |= {"library_name": library, "pipeline_tag": "text-generation"}
    tags = ["nemo_minitron", source.family]
    tags += ["pruning"] if plan is not None and not plan.is_identity else []
    tags += ["distillation"] if making.tokens else []
    found["tags"] = tags
    if datasets := [name for name in making.sources if _is_dataset(name)]:
        found["datasets"] = datasets
    return found


def _is_dataset(name: str) -> bool:
    """Whether a source of texts is the name of a dataset on the hub, not a file or folder."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).suffix and not Path(name).exists()


def _introduction(source: TensorSource, plan: PruningPlan | None) -> str:
    spec, lineage = source.spec, source.lineage
    base = lineage.get("base_model")
    origin = f" of {_line(base)}" if base else ""
    pruned = plan is not None and not plan.is_identity
    kind = f"A pruned version{origin}" if pruned else f"The weights{origin}" if origin else "A language model"
    sizes = f"{parameter_count(spec):,} parameters, {spec.num_layers} layers, hidden size {spec.hidden_size}"
    dtype = str(source.dtype).removeprefix("torch.")
    coded = [str(name) for name in lineage.get("quantisation") or () if name not in _PLAIN_TYPES]
    coded_as = f" The base model was read from a file quantised as {_line(', '.join(coded))}." if coded else ""
    return f"{kind}: {sizes}, {dtype}. Written by nemo_minitron {__version__}.{coded_as}"


def _sections(
    source: TensorSource, library: str, archive: str, making: Making, plan: PruningPlan | None
) -> Iterator[tuple[str, str]]:
    twin = {} if making.content is None else dict(markdown.twin(making.content))
    for title in ("At a glance", "Before and after"):
        if title in twin:
            yield title, twin[title]
    if plan is not None and not plan.is_identity:
        digest = plan.digest()
        kept = f"The kept units are listed in `{PLAN_FILE}` (plan {digest[:16]})."
        yield "What was cut", f"```\n{plan.table()}\n```\n\n{kept} {_UNTESTED}"
    if rows := _evaluation_rows(making.evaluation):
        yield "Evaluation", rows
    if speed := making.evaluation.get("speed"):
        yield "Speed", f"{_markdown(*speed_table(speed))}\n\n{speed_note(speed)}"
    if training := _training(making):
        yield "Training", training
    for title in ("Distillation", "Pipeline", "The same beginning"):
        if title in twin:
            yield title, twin[title]
    yield "Use", _use(source, library, archive)
    if licence := source.lineage.get("license"):
        files = [name for name in source.tokenizer_files() if name.startswith(("LICENSE", "NOTICE", "USE_POLICY"))]
        kept = f" Its terms are in {', '.join(f'`{name}`' for name in files)}." if files else ""
        yield "Licence", f"That of the base model: {_line(licence)}.{kept}"
    if again := twin.get("How to get this again"):
        yield "How to get this again", again
    if making.recipe:
        yield "Recipe", f"```yaml\n{making.recipe.rstrip()}\n```"


def _evaluation_rows(evaluation: Mapping[str, Any]) -> str:
    perplexity, errors = evaluation.get("perplexity") or {}, evaluation.get("standard_error") or {}
    bits = evaluation.get("bits_per_byte") or {}
    rows = []
    for role, words in _ROLES.items():
        if role in perplexity:
            error = f" ± {errors[role]:.2f}" if errors.get(role) is not None else ""
            rate = [f"{bits[role]['value']:.4f}"] if role in bits else []
            rows.append([words, f"{perplexity[role]:.2f}{error}", *rate])
    if not rows:
        return ""
    tokens = evaluation.get("tokens")
    over = f" over {tokens:,} tokens of" if tokens else " on"
    headings = ["model", "perplexity", "bits per byte"][: len(rows[0])]
    parts = [_markdown(headings, rows), f"Perplexity{over} held-out documents, on which nothing was trained."]
    if tasks := evaluation.get("tasks"):
        parts += [_markdown(*task_table(tasks)), "Score ± standard error (percentage of the base model's kept)."]
    return "\n\n".join(parts)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown.markdown({"headings": headings, "rows": rows})


def _training(making: Making) -> str:
    found = []
    if making.tokens:
        found.append(f"- tokens: {making.tokens:,}")
    if making.objective:
        found.append(f"- loss: {_line(making.objective)}")
    if making.sources:
        found.append(f"- texts: {', '.join(f'`{_line(name)}`' for name in making.sources)}")
    for kind, difference in making.checks.items():
        found.append(f"- read back as {kind}: logits differ by {difference:.1e} at most")
    return "\n".join(found)


def _use(source: TensorSource, library: str, archive: str) -> str:
    if archive:
        restored = f"model = MegatronGPTModel.restore_from({archive!r})"
        code = f"from nemo_minitron import MegatronGPTModel\n\n{restored}"
        return f"```python\n{code}\n```"
    if library != "transformers":
        return "`nemo-minitron convert . OTHER_FOLDER --to hf` writes it for `transformers`."
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer  # 4.56 or newer\n\n"
        'folder = "."  # where this file lies\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f'ids = tokenizer("{_PROMPT}", return_tensors="pt").input_ids\n'
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))"
    )
    return f"```python\n{code}\n```\n\n" + "\n\n".join(_serve(source, engine) for engine in (VLLM, LLAMA_CPP))


def _serve(source: TensorSource, engine: str) -> str:
    """How to serve the model with an engine, or why that does not work."""
    if why := objections(engine, source):
        return f"Not with {engine}: {'; '.join(why)}.{_INSTEAD[engine]}"
    return f"With {engine}{_SERVING[engine]}"


def _line(text: Any) -> str:
    """Text of a stranger in one line, without what Markdown or HTML would take for its own."""
    return re.sub(r"[<>`|\[\]]", "", " ".join(str(text).split()))[:200]
