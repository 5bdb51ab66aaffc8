"""Files that are the old ones or the new ones, never something between, and what a failed write means to a user."""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError, RunFolderError, denied

_FULL_DISK_WORDS = ("no space left on device", "storagefull", "disk quota exceeded", "quota exceeded")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, bring it to disk, then put it in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON as `write_text` does, keys in the order given."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunFolderError: The file is damaged.
        DeniedError: This user may not read it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise denied(error) or error from error
    except (ValueError, OSError) as error:
        raise RunFolderError(f"{path}: {error}", rule="a JSON object written by this package") from error
    if not isinstance(data, dict):
        raise RunFolderError(f"{path}: holds a {type(data).__name__}", rule="a JSON object written by this package")
    return data


def as_user_error(error: BaseException, folder: Path) -> MinitronError | None:
    """What a user can do about an exception of the file system; None when it is something else.

    A full disk reaches us as `OSError`, but also as the `RuntimeError` or `SafetensorError` of a library that wrote for
    us, so the words of the complete chain of causes are looked at.
    """
    chain = list(_causes(error))
    for item in chain:
        if isinstance(item, MinitronError):
            return item
    told = _limit(chain, folder) or denied(error)
    if told is not None:
        return told
    for item in chain:
        if isinstance(item, OSError) and item.errno is not None and item.filename is not None:
            return RunFolderError(
                f"{_shown(item.filename)}: {item.strerror}",
                remedy="see to that file or folder and repeat the command; what was finished stays",
            )
    return None


def _limit(chain: Sequence[BaseException], folder: Path) -> RunFolderError | None:
    """What to tell of a disk that is full, or of a file that has become too large."""
    for item in chain:
        if isinstance(item, OSError) and item.errno in (errno.ENOSPC, errno.EDQUOT):
            return _full_disk(item.filename, folder)
        if isinstance(item, OSError) and item.errno == errno.EFBIG:
            return RunFolderError(
                f"{_shown(item.filename) if item.filename is not None else folder}: file too large",
                rule="a checkpoint's files fit the limits of the file system and of `ulimit -f`",
                remedy="raise the limit or name a run folder elsewhere, and repeat the command",
            )
    if any(word in str(item).lower() for item in chain for word in _FULL_DISK_WORDS):
        return _full_disk(None, folder)
    return None


def _full_disk(filename: Any, folder: Path) -> RunFolderError:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    where = _shown(filename) if filename is not None else str(folder)
    return RunFolderError(
        f"{where}: no space left on the disk ({free:.2f} GiB free)",
        rule="a stage needs room for what it writes; nothing that was finished is lost",
        remedy="free some space and repeat the same command: it goes on where it stopped",
    )


def _shown(filename: Any) -> str:
    return os.fsdecode(filename) if isinstance(filename, (str, bytes, os.PathLike)) else str(filename)


def _causes(error: BaseException | None) -> Any:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
