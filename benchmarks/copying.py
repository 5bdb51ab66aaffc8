"""What large checkpoint jobs are measured against: copying the same bytes with the same disk.

Before each contest the source leaves the page cache (`posix_fadvise`), since 16 GB and a copy of it do not fit there on
the machines this is meant for; each ends with everything on the disk (`fsync`). A job is a process of its own, and its
complete life counts: interpreter, imports, work. Its memory is `ru_maxrss`, which includes all of that too.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_minitron.checkpoints.files import sync_folder
from nemo_minitron.checkpoints.large_files import open_binary

_STEP = 8 << 20


def nbytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    sync_folder(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path, copy: Callable[[Path, Path], object] = shutil.copyfile) -> float:
    """Time to copy a folder file by file to the disk; the copy is removed."""
    forget(source)
    began = time.perf_counter()
    shutil.copytree(source, target, copy_function=lambda one, other: copy(Path(one), Path(other)))
    sync_folder(target)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def copy_past_the_cache(source: Path, target: Path) -> None:
    """A copy with the same means as our readers and writers: the strictest thing to be compared with."""
    size = source.stat().st_size
    buffer = memoryview(bytearray(_STEP))
    with open_binary(source, "rb", nbytes=size) as read, open_binary(target, "wb", nbytes=size) as write:
        while count := read.readinto(buffer):  # type: ignore[attr-defined]
            write.write(buffer[:count])


def job_seconds(command: Sequence[str], source: Path) -> tuple[float, float]:
    """Seconds and peak resident gigabytes of `python -m COMMAND`, which reads `source`.

    Raises:
        SystemExit: It failed.
    """
    forget(source)
    began = time.perf_counter()
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
    report = "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    arguments = [sys.executable, "-c", f"{code}; {report}", *command]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}")
    return seconds, int(done.stdout.split()[-1]) * 1024 / 1e9
