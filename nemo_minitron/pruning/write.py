"""A pruned checkpoint on disk in the formats of recipes, tensor by tensor, without building a model."""

from pathlib import Path

from nemo_minitron.checkpoints.files import scratch_folder
from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.nemo1 import open_nemo, write_folder
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.run import ExportFormat


def paths_of(target: Path, formats: tuple[ExportFormat, ...]) -> dict[ExportFormat, Path]:
    """Where each format goes: `target` itself if there is one, else its name with each format's suffix."""
    if len(formats) == 1:
        return {formats[0]: target}
    stem = target.name.removesuffix(".nemo")
    return {kind: target.with_name(stem + FORMATS[kind].suffix) for kind in formats}


def write_checkpoint(source: TensorSource, target: Path, formats: tuple[ExportFormat, ...]) -> dict[ExportFormat, Path]:
    """Write a checkpoint, or a lazy view of one, in one or more formats; returns where each is.

    The source is read once: with several formats, all are made from a checkpoint folder, which for a student is the
    smaller of the two. Nothing of an earlier file or folder is touched before the new one is complete.

    Args:
        source: What to write.
        target: A path; `.nemo` at its end makes an archive, anything else an unpacked folder (see `paths_of`).
        formats: At least one.

    Raises:
        SpecError: A format cannot hold this architecture (layers of different sizes). Nothing was written.
    """
    places = paths_of(target, formats)
    for kind in places:
        FORMATS[kind].check(source.spec, source.family)
    if len(places) == 1:
        for kind, place in places.items():
            FORMATS[kind].write(source, place)
        return places
    with scratch_folder(target) as scratch:
        folder = scratch / "folder"
        write_folder(source, folder)
        for kind, place in places.items():
            FORMATS[kind].write(open_nemo(folder), place)
    return places
