"""The folder of a run: where each stage works, what is complete, and who may write.

    config.resolved.yaml  manifest.json  metrics.jsonl  tensorboard/  report.html  summary.json  README.md
    stages/<name>/            a complete stage: its files, result.json and DONE
    stages/.<name>.partial/   a stage at work; survives a kill, and the same command goes on in it
    stages/.replaced/         complete stages set aside by a redo, until the new ones are complete
    stages/.lock              held by the process at work (released by the system when that dies)
    .tmp/                     temporary files of libraries, while a process is at work

Only rank 0 changes anything here; other ranks read paths.
"""

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import digests
from nemo_minitron.checkpoints.files import sync, sync_folder
from nemo_minitron.errors import RunFolderError
from nemo_minitron.stages.files import read_json, write_json, write_text

DONE = "DONE"
RESULT = "result.json"
ATTEMPT = ".attempt.json"
CHECKPOINTS = "[0-9]*.ckpt"
"""Training checkpoints, by step."""
REPLACED = ".replaced"
UNFINISHED = (".tokens-*", ".chat-*", ".building-*", ".*.tmp")
"""Names of what is being written: they are given up or renamed when it is complete."""
OWN_FILES = (
    "config.resolved.yaml",
    "manifest.json",
    "metrics.jsonl",
    "tensorboard",
    "report.html",
    "summary.json",
    "README.md",
)


class RunFolder:
    """Paths of a run, and the few moves that change what is complete. Nothing is created before `create`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.stages = self.path / "stages"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.temporary = self.path / ".tmp"

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunFolderError: Something else is in the way.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(
                f"{self.path}: is a file", rule="a run folder", remedy="name another one with --run-dir"
            )
        foreign = [name for name in OWN_FILES if (self.path / name).exists()]
        if foreign and not self.stages.is_dir():
            raise RunFolderError(
                f"{self.path}: holds {', '.join(foreign)}, but no run",
                rule="a run folder is new, or made by this package: those files would be overwritten",
                remedy="name another one with --run-dir",
            )
        self.stages.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str) -> Path:
        """The folder of a complete stage.

        Raises:
            RunFolderError: The stage has not been finished.
        """
        if not self.is_complete(name):
            raise RunFolderError(
                f"{self.path}: stage {name} is not finished",
                rule=f"this needs what stage {name} makes",
                remedy=f"`nemo-minitron {name} RECIPE --run-dir {self.path}` makes it",
            )
        return self.stages / name

    def is_complete(self, name: str) -> bool:
        """Whether a stage has been finished."""
        return (self.stages / name / DONE).is_file()

    def result(self, name: str) -> dict[str, Any]:
        """What a complete stage returned, with `seconds` and `peak_memory_gb` added by the engine."""
        return read_json(self.stage(name) / RESULT)

    def done(self, name: str) -> dict[str, Any] | None:
        """The record of a complete stage; None when there is none."""
        return read_json(self.stages / name / DONE) if self.is_complete(name) else None

    def current(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Records of complete stages, in the order of the chain, without what was made from a stage redone since."""
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            record = self.done(name)
            if record and all(
                found.get(each, {}).get("digest") == digest for each, digest in record["upstream"].items()
            ):
                found[name] = record
        return found

    def partial(self, name: str) -> Path:
        """Where a stage works."""
        return self.stages / f".{name}.partial"

    def attempt(self, name: str) -> dict[str, Any] | None:
        """The record of an unfinished stage; None when there is none."""
        path = self.partial(name) / ATTEMPT
        return read_json(path) if path.is_file() else None

    def begin(self, name: str, record: dict[str, Any]) -> None:
        """Make or take up a stage's working folder."""
        self.partial(name).mkdir(parents=True, exist_ok=True)
        write_json(self.partial(name) / ATTEMPT, record)

    def finish(self, name: str, record: dict[str, Any], result: dict[str, Any]) -> Path:
        """Turn a working folder, once it is on the disk, into a complete stage; what it replaces goes after that."""
        partial, whole = self.partial(name), self.stages / name
        write_json(partial / RESULT, result)
        write_json(partial / DONE, record)
        (partial / ATTEMPT).unlink(missing_ok=True)
        self.adopt(name)
        return whole

    def adopt(self, name: str) -> bool:
        """Rename a working folder that is complete (a kill may have come between); whether there was one."""
        partial = self.partial(name)
        if not (partial / DONE).is_file():
            return False
        sync_folder(partial)
        self.set_aside(name)
        partial.rename(self.stages / name)
        sync(self.stages)
        for old in self.set_aside_folders(name):
            shutil.rmtree(old)
        return True

    def set_aside(self, name: str) -> None:
        """Move a stage, complete and partial, out of the way, where it stays until its successor is complete."""
        for path in (self.stages / name, self.partial(name)):
            if not path.exists() or (path == self.partial(name) and (path / DONE).is_file()):
                continue
            kept = self.stages / REPLACED
            kept.mkdir(exist_ok=True)
            label = f"{name}.partial" if path == self.partial(name) else name
            path.rename(next(free for n in count(1) if not (free := kept / f"{label}.{n}").exists()))

    def set_aside_folders(self, name: str) -> list[Path]:
        """What of a stage has been set aside and not been removed."""
        kept = self.stages / REPLACED
        # Of stage `distill`, not `distill.1.1`, which is of stage `distill.1`.
        label = re.compile(rf"{re.escape(name)}(\.partial)?\.\d+")
        return sorted(path for path in kept.glob(f"{name}.*") if label.fullmatch(path.name)) if kept.is_dir() else []

    def set_aside_records(self, name: str) -> list[dict[str, Any]]:
        """Records of what of a stage has been set aside, complete or at work."""
        paths = (folder / record for folder in self.set_aside_folders(name) for record in (DONE, ATTEMPT))
        return [read_json(path) for path in paths if path.is_file()]

    def newest_checkpoint(self) -> Path | None:
        """The training checkpoint that was finished last, of a stage at work; its digests are not checked here."""
        found = self.stages.glob(f".*.partial/checkpoints/{CHECKPOINTS}")
        return max((path for path in found if digests.is_finished(path)), key=_finished_at, default=None)

    def where_to_go_on(self) -> str:
        """For messages of a run that ends early: what is saved, and how to go on."""
        newest = self.newest_checkpoint()
        if newest is None:
            return "no training checkpoint is there; finished stages are kept, and the same command goes on behind them"
        return f"newest complete checkpoint: {newest} (step {int(newest.stem)}); the same command goes on from there"

    def clear_leftovers(self) -> None:
        """Remove unfinished files that a killed process has left, in stages at work and in finished ones; and `.tmp`.

        Called by the process that holds the lock, so that none of them is anyone's. Shards of a stage at work stay.
        """
        folders = [path for path in self.stages.iterdir() if path.is_dir() and path.name != REPLACED]
        finished = [path for path in folders if (path / DONE).is_file()]
        leftovers = [self.temporary, *(path for folder in finished for path in folder.glob(".shards"))]
        for folder in (self.path, self.stages, *folders, *(path / "index" for path in folders)):
            leftovers += [path for pattern in UNFINISHED for path in folder.glob(pattern)]
        for path in leftovers:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def write_config(self, yaml: str) -> None:
        """Save the resolved recipe of the run's newest command."""
        write_text(self.path / "config.resolved.yaml", yaml)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against another process.

        A POSIX record lock: the system gives it back when the process ends, however it ends, and forked data-loader
        workers do not inherit it. The file's text only says who holds it.

        Raises:
            RunFolderError: Another process works here.
        """
        path = self.stages / ".lock"
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise RunFolderError(
                    f"{self.path}: another run is at work here ({_holder(path)})",
                    rule="one run in a folder at a time",
                    remedy="wait for it, stop it, or name another folder with --run-dir",
                ) from error
            file.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


def _finished_at(checkpoint: Path) -> float:
    return (checkpoint / digests.NAME).stat().st_mtime


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError, OSError):
        return "its process did not say who it is"
