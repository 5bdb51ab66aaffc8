"""A folder or an uncompressed tar as one thing to read from, and writes that are complete or absent."""

import errno
import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from nemo_minitron.checkpoints.large_files import open_binary
from nemo_minitron.checkpoints.temporary_names import replace_folder, temporary_names
from nemo_minitron.errors import CheckpointError


class Files(Protocol):
    """Named files of a checkpoint, wherever they lie."""

    @property
    def label(self) -> str:
        """What to call all of it in messages."""
        ...

    def names(self) -> tuple[str, ...]:
        """Relative names with forward slashes, sorted."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A seekable stream over a file's bytes, to be closed by the caller."""
        ...


def open_files(path: Path) -> Files:
    """Files of a folder, or of a tar that is read in place, never unpacked."""
    return FolderFiles(path) if path.is_dir() else TarFiles(path)


def read_bytes(files: Files, name: str) -> bytes:
    """A complete (small) file.

    Raises:
        CheckpointError: There is no such file.
    """
    if name not in files.names():
        raise CheckpointError(f"{files.label}: {name} is missing")
    with files.open(name) as stream:
        return stream.read()


class FolderFiles:
    """The files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.label = str(folder)
        self._names = tuple(sorted(_names_below(folder)))

    def names(self) -> tuple[str, ...]:
        """Relative names with forward slashes, sorted."""
        return self._names

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.folder / name).stat().st_size

    def open(self, name: str) -> BinaryIO:
        """A stream over a file."""
        return open_binary(self.folder / name, "rb", nbytes=self.size(name))


def _names_below(folder: Path) -> Iterator[str]:
    """Files below a folder, through links to folders too; a link back up is entered once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if (path := Path(place, name)).is_file():
                yield path.relative_to(folder).as_posix()


class TarFiles:
    """The members of an uncompressed tar, read where they lie.

    Raises:
        CheckpointError: Not a tar, a compressed one, a truncated one, or one with links, devices, names that lead
            outside, or two members of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        try:
            with tarfile.open(path, "r:") as archive:
                members = [_checked(member, path) for member in archive if not member.isdir()]
        except (tarfile.TarError, EOFError) as error:
            raise CheckpointError(
                f"{path}: not a readable .nemo file ({error})",
                rule="an uncompressed tar, as NeMo writes since 1.7",
                remedy="gunzip an older one first; fetch a damaged one again",
            ) from error
        self._members = dict(members)
        if len(self._members) < len(members):
            names = Counter(name for name, _ in members)
            raise CheckpointError(
                f"{path}: holds {names.most_common(1)[0][0]} twice",
                rule="one file of a name; tar unpacks the last one over the others",
                remedy="unpack it, see which one is meant, and pack it again",
            )
        end = max((start + size for start, size in self._members.values()), default=0)
        self._size = path.stat().st_size
        if end > self._size:
            raise CheckpointError(f"{path}: truncated at {self._size} of at least {end} bytes")

    def names(self) -> tuple[str, ...]:
        """Member names without a leading `./`, sorted."""
        return tuple(sorted(self._members))

    def size(self, name: str) -> int:
        """Bytes of a member."""
        return self._members[name][1]

    def open(self, name: str) -> BinaryIO:
        """A stream over a member's bytes."""
        start, size = self._members[name]
        return io.BufferedReader(Window(open_binary(self.path, "rb", nbytes=self._size), start, size, owns=True))


def _checked(member: tarfile.TarInfo, path: Path) -> tuple[str, tuple[int, int]]:
    name = PurePosixPath(member.name)
    if not member.isreg() or name.is_absolute() or ".." in name.parts:
        raise CheckpointError(
            f"{path}: refused because of its member {member.name!r}",
            rule="a .nemo file holds plain files below its own top; no links, devices, absolute paths or '..'",
        )
    return name.as_posix(), (member.offset_data, member.size)


class Window(io.RawIOBase):
    """A read-only, seekable view of a stretch of an open stream; closing it closes the stream only if owned."""

    def __init__(self, stream: BinaryIO, start: int, size: int, *, owns: bool = False) -> None:
        self._stream, self._start, self._size, self._position = stream, start, size, 0
        self._owns = owns

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move inside the window; positions before its start are an OSError."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError("negative seek position")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        """Position inside the window."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what is left of the window, at most."""
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._position)]
        self._stream.seek(self._start + self._position)
        count: int = self._stream.readinto(view) or 0  # type: ignore[attr-defined]
        self._position += count
        return count

    def close(self) -> None:
        """Close the stream below if it is owned."""
        if self._owns:
            self._stream.close()
        super().close()


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and is removed when not.

    What `target` held before stays complete until the new folder is, and the new one is on the disk before it takes the
    name. A kill between the two renames leaves the old folder as `.NAME.old`; the next write puts it back first.
    Several processes may write one target: each has temporary names of its own, and what the last one wrote stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_names(target, folder=True) as names:
        names.partial.mkdir()
        try:
            yield names.partial
            sync_folder(names.partial)
        except BaseException:
            shutil.rmtree(names.partial, ignore_errors=True)
            raise
        replace_folder(target, names)
        sync(target.parent)
        if names.old.exists():
            shutil.rmtree(names.old)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A temporary file name beside `target` that is renamed onto it when the block ends well, and removed when not.

    The new content is on the disk before it takes the name, so a power failure leaves the old or the new, never half.
    Several processes may write one target, as with `staged_folder`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_names(target, folder=False) as names:
        try:
            yield names.partial
            sync(names.partial)
            names.partial.replace(target)
            sync(target.parent)
        except BaseException:
            names.partial.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Wait until all files below a folder, and their names, are on the disk."""
    for path, _, names in os.walk(folder, topdown=False):
        for file in (Path(path, name) for name in names):
            if file.is_file() and not file.is_symlink():
                sync(file)
        sync(Path(path))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; their files have been synced.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(handle)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which goes with the block; what a killed process has left of one goes first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_names(target.with_name(f"{target.name}.unpacked"), folder=True) as names:
        names.partial.mkdir()
        try:
            yield names.partial
        finally:
            shutil.rmtree(names.partial, ignore_errors=True)
