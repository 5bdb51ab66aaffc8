"""Export: the finished student as `.nemo` and as a Hugging Face folder, each checked by reading it back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.run import ExportFormat
from nemo_minitron.errors import CheckpointError, RunFolderError
from nemo_minitron.evaluation.difference import first_state_difference, first_weight_difference, largest_difference
from nemo_minitron.evaluation.logits import gather_logits
from nemo_minitron.evaluation.states import States, megatron_states, transformers_states
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.report.content import ReportContent
from nemo_minitron.report.model_card import CARD
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.cards import card, export_path
from nemo_minitron.stages.report import gather
from nemo_minitron.stages.session import make_trainer, restore

CHECK_TOKENS = 128
"""Held-out tokens whose logits are compared."""


def run(context: StageContext) -> dict[str, Any]:
    """Write `<name>.nemo` and `<name>_hf/`; returns their sizes and the largest difference of logits.

    Raises:
        CheckpointError: What was written does not give the finished model back; says where it begins to differ.
    """
    student = context.input("student")
    megatron_runtime.on_rank_zero(lambda: _write(context, student), doing="writes the exports")
    differences = _check(context, student)
    sizes = {kind.value: _size(_path(context, kind)) for kind in context.config.export.formats}
    files = {kind.value: _path(context, kind).name for kind in context.config.export.formats}
    worst = max(differences.values(), default=0.0)
    return {
        "files": files,
        "bytes": sizes,
        "largest_logit_difference": differences,
        "summary": f"{', '.join(files.values())}; read back, logits differ by {worst:.1e} at most",
    }


def _path(context: StageContext, kind: ExportFormat) -> Path:
    return export_path(context.out, context.config, kind)


def _write(context: StageContext, student: Path) -> None:
    source, content = open_checkpoint(student), _content(context)
    for kind in context.config.export.formats:
        text = card(source, context.config, kind, content)
        FORMATS[kind].write(source, _path(context, kind), extra_files={CARD: text.encode()})


def _content(context: StageContext) -> ReportContent | None:
    """What the stages before have come to; what was measured on an earlier model is left out."""
    try:
        return gather(context.run, context.config, scores=False)
    except (RunFolderError, OSError):
        return None


# -- the check -------------------------------------------------------------------------------------------------------


def _check(context: StageContext, student: Path) -> dict[str, float]:
    """Largest difference of logits by format, on every rank.

    A model on one rank is compared layer by layer, so that it need not fit into memory; one that is spread over ranks
    runs at its current layout.

    Raises:
        CheckpointError: One is beyond `export.check_tolerance`, or is no number.
    """
    parallel = context.config.parallel
    tokens = _check_tokens(context)
    if parallel.ranks > 1:
        return _check_spread(context, student, tokens)
    differences: dict[str, float] = {}
    failure: CheckpointError | None = None
    if context.rank == 0:
        try:
            expected = megatron_states(open_checkpoint(student), tokens, megatron_runtime.current())
            for kind in context.config.export.formats:
                found = _states(_path(context, kind), kind, tokens)
                differences[kind.value] = largest_difference(expected, found)
                _judge(context, kind, student, found["logits"], expected["logits"], states=(expected, found))
        except CheckpointError as error:
            failure = error
    differences, failure = megatron_runtime.broadcast_object(
        (differences, failure), patient=True, doing="reads the exports back"
    )
    if failure is not None:
        raise failure
    return differences


def _states(path: Path, kind: ExportFormat, tokens: Tensor) -> States:
    """What the exported checkpoint computes: a Hugging Face folder under `transformers`, as its users will run it."""
    if kind is ExportFormat.HF:
        return transformers_states(path, tokens)
    return megatron_states(open_checkpoint(path), tokens, megatron_runtime.current())


def _check_spread(context: StageContext, student: Path, tokens: Tensor) -> dict[str, float]:
    """The same for a model over several ranks; every rank calls it and gets the same numbers."""
    expected = _logits(context, student, tokens)
    differences: dict[str, float] = {}
    for kind in context.config.export.formats:
        path = _path(context, kind)
        if kind is ExportFormat.HF:
            found = megatron_runtime.broadcast_object(
                transformers_states(path, tokens)["logits"] if context.rank == 0 else None
            )
        else:
            found = _logits(context, path, tokens)
        differences[kind.value] = (found - expected).abs().max().item()
        _judge(context, kind, student, found, expected)
    return differences


def _check_tokens(context: StageContext) -> Tensor:
    """The first held-out tokens, `[1, n]`."""
    length = min(CHECK_TOKENS, context.config.evaluate.sequence_length)
    window = WindowDataset(context.input("data"), "heldout", length, 1)[0]
    return window["tokens"].unsqueeze(0)


@torch.no_grad()
def _logits(context: StageContext, path: Path, tokens: Tensor) -> Tensor:
    """Our model's, in fp32, at the run's layout."""
    config = context.config.model_copy(update={"precision": Precision.FP32})
    model = restore(MegatronGPTModel, path, config=config, micro_batch_size=1, trainer=make_trainer(config))
    model.eval()
    return gather_logits(model.chunks, tokens, model.runtime, model.spec.vocab_size).cpu()


def _judge(
    context: StageContext,
    kind: ExportFormat,
    student: Path,
    found: Tensor,
    expected: Tensor,
    *,
    states: tuple[States, States] | None = None,
) -> None:
    """Refuse an export whose logits differ by more than rounding, which grows with the logits themselves."""
    tolerance = context.config.export.check_tolerance
    difference, size = (found - expected).abs().max().item(), expected.double().square().mean().sqrt().item()
    if difference <= tolerance * max(size, 1.0):
        return
    first = first_weight_difference(open_checkpoint(student), open_checkpoint(_path(context, kind)))
    if not first:
        first = "all weights are the same"
        if states is not None and (where := first_state_difference(*states, tolerance=tolerance)):
            first += f"; of what the layers compute, the first to differ is {where}"
    raise CheckpointError(
        f"export as {kind.value}: logits of {size:.3g} (root mean square) differ by {difference:.2e} from the finished "
        f"model's\n"
        f"  first difference: {first}",
        rule=f"at most export.check_tolerance = {tolerance:.0e} of them, both in fp32",
        remedy="this is a defect of the export; please report it with the model's config.json",
    )


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
