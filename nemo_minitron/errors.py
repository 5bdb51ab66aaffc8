"""What users see when something is wrong: what, which rule, and the remedy.

The command line prints these without a traceback and exits with status 2.
Anything else that escapes is a defect of ours.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class MinitronError(Exception):
    """An error whose cause lies in what the user gave us.

    Args:
        what: The key or file, and the value found there.
        rule: What would have been right.
        remedy: What to do about it.
    """

    def __init__(self, what: str, *, rule: str = "", remedy: str = "") -> None:
        self.what = what
        self.rule = rule
        self.remedy = remedy
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self), dict(self.__dict__))

    def __str__(self) -> str:
        lines = [self.what]
        if self.rule:
            lines.append(f"  rule: {self.rule}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


def _revive(kind: type[MinitronError], state: dict[str, Any]) -> MinitronError:
    """Rebuild an error that came from another process, whatever arguments its class takes."""
    error = kind.__new__(kind, state["what"])
    error.__dict__.update(state)
    return error


class ConfigError(MinitronError):
    """A recipe or an override that cannot be run; carries every problem found, not only the first."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = list(problems)
        listing = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{source}: {len(problems)} problem(s)\n{listing}")


class CheckpointError(MinitronError):
    """A checkpoint that is missing, damaged, or not what it says it is."""


class SpecError(MinitronError):
    """An architecture that cannot exist, or two that do not fit each other."""


class ScoresError(MinitronError):
    """Importance scores that are damaged or belong to something else."""


class PlanError(MinitronError):
    """A pruning plan that cannot be made, or does not fit what it is applied to."""


class SearchError(MinitronError):
    """A search that cannot begin or end: no shape fits, rules contradict each other, no candidate is left."""


class CacheError(MinitronError):
    """A teacher's cached targets that are missing, damaged, or of other data."""


class DataError(MinitronError):
    """Text or token files that are missing, empty, too short, or made with another tokenizer."""


class AssetError(MinitronError):
    """A file inside a Python package that cannot be fetched, or is not what its address says."""


class LayoutError(MinitronError):
    """Parallel sizes that do not fit the model or the number of processes."""


class LaunchError(MinitronError):
    """A job that cannot be handed to a scheduler or a launcher, or whose environment contradicts what is asked."""


class RunFolderError(MinitronError):
    """A run folder that belongs to another recipe, or cannot be written."""


class TrainingError(MinitronError):
    """Training that cannot start or go on: a teacher without weights, a loss that is not a number."""


class LostRankError(MinitronError):
    """Another process of the run is gone or does not answer. What the user can do is to look why, and go on."""


class DeniedError(MinitronError):
    """A file or folder that this user may not read or write."""


def denied(error: BaseException) -> DeniedError | None:
    """What to tell the user of an exception that says "permission denied"; None when neither it nor a cause does.

    Most are `PermissionError`s with the file's name; libraries in Rust and C++ give their own with the words only.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DENIED and seen.filename is not None:
            name = os.fsdecode(seen.filename) if isinstance(seen.filename, (str, bytes)) else str(seen.filename)
            return _denied(f"{name}: {seen.strerror}{_owner(Path(name))}")
        if isinstance(seen, Exception) and "permission denied" in str(seen).lower():
            return _denied(str(seen).splitlines()[0])
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _denied(what: str) -> DeniedError:
    return DeniedError(
        what,
        rule="the user who runs the command may read what it is given and write to the run folder",
        remedy="change the permissions (chmod, chown), or name another file or folder",
    )


def _owner(path: Path) -> str:
    """Owner and permissions of a path, or of the nearest folder above it that this user can look at."""
    for place in (path, *path.absolute().parents):
        try:
            found = place.stat()
        except OSError:
            continue
        subject = "it" if place == path else str(place)
        return f" ({subject} is {stat.filemode(found.st_mode)} of user {found.st_uid}; this is user {os.geteuid()})"
    return ""
