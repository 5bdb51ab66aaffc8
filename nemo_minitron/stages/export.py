"""Export: the distilled student as `.nemo` and as a Hugging Face folder, each checked by reading it back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.nemo1 import pack_nemo
from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.run import ExportFormat
from nemo_minitron.errors import CheckpointError
from nemo_minitron.evaluation.logits import gather_logits
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.session import make_trainer, restore

CHECK_TOKENS = 128
"""Held-out tokens whose logits are compared."""


def run(context: StageContext) -> dict[str, Any]:
    """Write `<name>.nemo` and `<name>_hf/`; returns their sizes and the largest difference of logits.

    Raises:
        CheckpointError: What was written does not give the distilled model back.
    """
    student = context.input("student")
    if context.rank == 0:
        _write(context, student)
    megatron_runtime.barrier()
    tokens = _check_tokens(context)
    expected = _logits(context, student, tokens)
    differences: dict[str, float] = {}
    for kind in context.config.export.formats:
        path = _path(context, kind)
        found = _hf_logits(path, tokens) if kind is ExportFormat.HF else _logits(context, path, tokens)
        differences[kind.value] = (found - expected).abs().max().item()
    _judge(differences, tolerance=context.config.export.check_tolerance)
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
    name = context.config.name
    return context.out / (f"{name}.nemo" if kind is ExportFormat.NEMO else f"{name}_hf")


def _write(context: StageContext, student: Path) -> None:
    for kind in context.config.export.formats:
        if kind is ExportFormat.NEMO:
            pack_nemo(student, _path(context, kind))
        else:
            write_hf(open_checkpoint(student), _path(context, kind))


def _check_tokens(context: StageContext) -> Tensor:
    """The first held-out tokens, `[1, n]`."""
    length = min(CHECK_TOKENS, context.config.evaluate.sequence_length)
    window = WindowDataset(context.input("data"), "heldout", length, 1)[0]
    return window["tokens"].unsqueeze(0)


def _logits(context: StageContext, path: Path, tokens: Tensor) -> Tensor:
    """Our model's, in fp32, at the run's layout."""
    config = context.config.model_copy(update={"precision": Precision.FP32})
    model = restore(MegatronGPTModel, path, config=config, micro_batch_size=1, trainer=make_trainer(config))
    model.eval()
    return gather_logits(model.chunks, tokens, model.runtime, model.spec.vocab_size).cpu()


@torch.no_grad()
def _hf_logits(path: Path, tokens: Tensor) -> Tensor:
    """What `transformers` makes of the exported folder, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model(tokens).logits.float()


def _judge(differences: dict[str, float], *, tolerance: float) -> None:
    for kind, difference in differences.items():
        if not difference <= tolerance:
            raise CheckpointError(
                f"export as {kind}: logits differ from the distilled model's by {difference:.2e}",
                rule=f"at most export.check_tolerance = {tolerance:.0e}, both in fp32",
                remedy="this is a defect of the export; please report it with the model's config.json",
            )


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
