"""A pruned checkpoint on disk: Hugging Face, `.nemo` or both, tensor by tensor, without building a model."""

import tempfile
from pathlib import Path

from nemo_minitron.arch.families import family_named
from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.nemo1 import NemoSource, pack_nemo, write_folder
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.run import ExportFormat


def paths_of(target: Path, formats: tuple[ExportFormat, ...]) -> dict[ExportFormat, Path]:
    """Where each format goes: `target` itself if there is one, else `TARGET_hf/` and `TARGET.nemo`."""
    if len(formats) == 1:
        return {formats[0]: target}
    stem = target.name.removesuffix(".nemo")
    names = {ExportFormat.HF: f"{stem}_hf", ExportFormat.NEMO: f"{stem}.nemo"}
    return {kind: target.with_name(names[kind]) for kind in formats}


def write_checkpoint(source: TensorSource, target: Path, formats: tuple[ExportFormat, ...]) -> dict[ExportFormat, Path]:
    """Write a checkpoint, or a lazy view of one, in one or both formats; returns where each is.

    The source is read once: with both formats, the Hugging Face folder is converted from the NeMo folder, which for a
    student is the smaller of the two. Nothing of an earlier file or folder is touched before the new one is whole.

    Args:
        source: What to write.
        target: A path; `.nemo` at its end makes an archive, anything else an unpacked folder (see `paths_of`).
        formats: One or both.

    Raises:
        SpecError: `config.json` cannot say this architecture (layers of different sizes). Nothing was written.
    """
    places = paths_of(target, formats)
    if ExportFormat.HF in places:
        family_named(source.spec.family).write_config(source.spec)
    nemo, hf = places.get(ExportFormat.NEMO), places.get(ExportFormat.HF)
    if nemo is None or nemo.suffix != ".nemo":
        if nemo is not None:
            write_folder(source, nemo)
        elif hf is not None:
            write_hf(source, hf)
        return places
    nemo.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=nemo.parent, prefix=f".{nemo.name}.") as scratch:
        folder = Path(scratch) / "folder"
        write_folder(source, folder)
        if hf is not None:
            write_hf(NemoSource(folder), hf)
        pack_nemo(folder, nemo)
    return places
