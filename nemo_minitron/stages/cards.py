"""Model cards of a run's exports, from what the run knows by the time they are written."""

from pathlib import Path

from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.load import to_yaml
from nemo_minitron.config.run import ExportFormat, RunConfig
from nemo_minitron.report.content import ReportContent
from nemo_minitron.report.model_card import CARD, Making, model_card
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.files import write_text
from nemo_minitron.stages.run_folder import RunFolder


def export_path(folder: Path, config: RunConfig, kind: ExportFormat) -> Path:
    """Where stage export puts a format below its folder."""
    return folder / (config.name + FORMATS[kind].suffix)


def card(source: TensorSource, config: RunConfig, kind: ExportFormat, content: ReportContent | None) -> str:
    """The card of an export.

    Args:
        source: The student.
        config: The recipe.
        kind: Format of the export.
        content: What the run has come to; None if that is too little for a report.
    """
    results = {} if content is None else content.results
    distilled = results.get("distill", {})
    making = Making(
        recipe=to_yaml(config),
        objective=distilled.get("objective", ""),
        tokens=distilled.get("tokens"),
        sources=tuple(str(name) for name in config.data.named),
        evaluation=results.get("evaluate", {}),
        content=content,
    )
    archive = config.name + FORMATS[kind].suffix if kind is ExportFormat.NEMO else ""
    return model_card(source, name=config.name, library=FORMATS[kind].library, archive=archive, making=making)


def refresh(run: RunFolder, config: RunConfig, content: ReportContent) -> None:
    """Write the card of an exported Hugging Face folder again: an evaluation may be newer than the export.

    The one inside a `.nemo` archive stays as it is. Stage export is finished.
    """
    folder = export_path(run.stage("export"), config, ExportFormat.HF)
    (student,) = (stage.inputs["student"] for stage in chain_for(config) if stage.name == "export")
    if folder.is_dir() and (run.stages / student).exists():
        text = card(open_checkpoint(run.stages / student), config, ExportFormat.HF, content)
        write_text(folder / CARD, text)
