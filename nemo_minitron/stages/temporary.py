"""Temporary files of libraries lie in the run folder: what a killed process leaves there, the next run clears."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.stages.run_folder import RunFolder

_LONGEST = 75
"""Characters of the folder's path: `multiprocessing` puts sockets below it, whose paths may have 107."""


@contextmanager
def temporary_files_in(run: RunFolder, rank: int) -> Iterator[None]:
    """Inside the block, `tempfile` of this process makes its files below the run folder; rank 0 removes them after it.

    Importing NeMo imports wandb, which makes temporary folders there and then. A run folder whose path is so long that
    sockets would not fit leaves the system's folder in place. What PyTorch has compiled stays there, for later runs.
    """
    before = tempfile.tempdir
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")))
    if len(str(run.temporary)) <= _LONGEST:
        tempfile.tempdir = str(run.temporary)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if rank == 0:
            shutil.rmtree(run.temporary, ignore_errors=True)
