"""SHA-256 of every file of a checkpoint, in a file that `sha256sum -c SHA256SUMS` checks too.

It is written last, so a folder that has one is finished; what it says is checked before the checkpoint is read.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = "SHA256SUMS"
VISIBLE_WITHIN = 60.0
"""Seconds after which a shared file system shows every machine what another one has written (NFS remembers for up to
60 s that a name was not there)."""


def is_finished(folder: Path) -> bool:
    """Whether the digests are there."""
    return (folder / NAME).is_file()


def sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digest by name, of files in a folder."""
    return {name: _sha256(folder / name) for name in names}


def write(folder: Path, digests: Mapping[str, str]) -> None:
    """Finish a folder."""
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def read(folder: Path) -> dict[str, str]:
    """Digest by name, as they were written.

    Raises:
        ValueError: The file is damaged.
    """
    lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    found = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not found or not all(len(digest) == 64 and name and "/" not in name for name, digest in found.items()):
        raise ValueError(f"{NAME} is damaged")
    return found


def fault(folder: Path, digests: Mapping[str, str]) -> str:
    """What is wrong with the first file that is not as its digest says; empty when all are."""
    for name, digest in digests.items():
        if not await_visible(folder / name):
            return f"{name} is missing"
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != digest:
            return f"{name} is not what was written: its SHA-256 begins with {found[:8]} instead of {digest[:8]}"
    return ""


def await_visible(path: Path, *, seconds: float | None = None) -> bool:
    """Wait until a path that another machine has made is seen from here; False when it does not come.

    `seconds` None waits for `VISIBLE_WITHIN`.
    """
    end = time.monotonic() + (VISIBLE_WITHIN if seconds is None else seconds)
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
