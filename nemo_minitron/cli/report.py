"""`report` on run folders: make the report of one anew, or compare several on one page."""

from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.cli.closing import shown
from nemo_minitron.errors import RunFolderError

COMPARISON = Path("comparison.html")


def folders(arguments: Sequence[str]) -> list[Path]:
    """The run folders that a command line names; empty where its first word is a recipe.

    Raises:
        RunFolderError: Run folders and something else are mixed.
    """
    paths = [Path(argument) for argument in arguments]
    if not _is_run(paths[0]):
        return []
    for path in paths[1:]:
        if not _is_run(path):
            raise RunFolderError(
                f"{path}: no run folder",
                rule="`report` takes run folders, or one recipe and KEY=VALUE",
                remedy="name folders that `nemo-minitron run` printed, or that --run-dir gave",
            )
    return paths


def _is_run(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def report(paths: Sequence[Path], out: Path | None) -> str:
    """Write the page of one run or of several; returns what to say.

    Raises:
        RunFolderError: One is no run folder, or has not come far enough.
    """
    from nemo_minitron.stages.report import again, compare

    page = again(paths[0], out) if len(paths) == 1 else compare(paths, COMPARISON if out is None else out)
    return f"report   {shown(page)}"
