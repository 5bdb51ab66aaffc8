"""Which checkpoint a training stage goes on from: the newest one whose every file is as it was written."""

import shutil
from collections.abc import Callable
from pathlib import Path

from nemo_minitron.checkpoints import digests
from nemo_minitron.megatron import runtime
from nemo_minitron.stages.run_folder import CHECKPOINTS


def newest_complete(folder: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The complete checkpoint with the most steps. Collective: rank 0 looks, all ranks share the reading.

    A damaged one is set aside as `STEP.damaged`, where it stays until the stage is finished.

    Args:
        folder: Where checkpoints lie, or will.
        warn: Told of each damaged one, and if none is left.

    Returns:
        None if there is none to go on from.
    """
    here = runtime.current()
    found = sorted(folder.glob(CHECKPOINTS), reverse=True) if here.rank == 0 else None
    paths = runtime.broadcast_object(found, patient=True, doing="looks for checkpoints")
    for path in paths:
        if not (fault := _fault(path)):
            return path
        aside = path.with_suffix(".damaged")
        if here.rank == 0:
            _set_aside(path, aside)
        warn(f"warning: {path} is damaged ({fault}); set aside as {aside.name}, going on from the one before")
    if paths:
        warn("warning: no complete checkpoint is left: training starts from the beginning")
    return None


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is. Each rank reads its share of the files."""
    here = runtime.current()
    found = _files(path) if here.rank == 0 else None
    plan = runtime.broadcast_object(found, patient=True, doing=f"lists the files of {path.name}")
    if isinstance(plan, str):
        return plan
    own = {name: digest for name, digest in plan[here.rank :: here.world_size]}
    return next(filter(None, runtime.gather_objects(digests.fault(path, own))), "")


def _files(path: Path) -> list[tuple[str, str]] | str:
    """Names and digests, or why there are none. Largest files first, so that ranks get shares of about one size."""
    try:
        listed = digests.read(path)
        return sorted(listed.items(), key=lambda item: -(path / item[0]).stat().st_size)
    except (OSError, ValueError) as error:
        return f"{digests.NAME} is missing" if not digests.is_finished(path) else str(error)


def _set_aside(path: Path, aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
