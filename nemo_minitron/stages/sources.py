"""What a data stage notes about the files it was given, and whether they have changed since. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.data.assets import location
from nemo_minitron.data.survey import Survey, changes
from nemo_minitron.stages.files import read_json, write_json
from nemo_minitron.stages.run_folder import RunFolder

if TYPE_CHECKING:
    from nemo_minitron.config.run import RunConfig

NAME = "sources.json"
"""Files that were used, how to tell later whether they have changed, and all that were not used."""


def write_sources(folder: Path, found: Survey) -> None:
    """Write `sources.json`."""
    left_out = [{"path": item.path, "reason": item.reason} for item in found.left_out]
    write_json(folder / NAME, {"files": found.fingerprint(), "left_out": left_out})


def changed(config: "RunConfig", run: RunFolder) -> list[str]:
    """How the sources differ from those that the finished data stage was made from."""
    path = run.stage("data") / NAME
    if not path.is_file():  # of existing token files, or made by an earlier version
        return []
    try:
        return changes(read_json(path)["files"], [location(source) for source in config.data.sources])
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]
