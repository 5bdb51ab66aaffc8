"""Which files of a source hold texts, and which do not, with the reason: nothing is left out without a word.

What a file holds is told by its name, and its first bytes can contradict that: a Git LFS pointer, a file that another
tool keeps beside its data, or binary data under the name of a text. Links are followed; a file that is reached twice is
used once.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_minitron.data import arrow_folder
from nemo_minitron.data.streams import MAGIC, SUFFIXES, opened
from nemo_minitron.errors import DataError

KINDS = (
    ".txt, .jsonl, .ndjson, .parquet, .arrow, MediaWiki .xml; each but parquet and arrow also as .gz, .bz2, .xz or .zst"
)

_HEAD = 1 << 16
_HIDDEN = "hidden"
_UNREADABLE = "this user may not read it"
_TOOL_FOLDERS = frozenset({"_temporary", "_delta_log", "__MACOSX", "__pycache__", "lost+found"})
_TOOL_FILES = re.compile(r"_metadata|_common_metadata|_SUCCESS|.*\.crc|.*-multistream-index\d*\.txt(-p\d+p\d+)?")
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"\.(bin|idx)$", "a Megatron token file (a prefix of these goes under data.blend)"),
    (r"\.(tar|zip|7z|tgz|tar\.\w+|rar)$", "an archive (unpack it)"),
    (r"~$|\.(part|tmp|incomplete|crdownload|download)$", "unfinished, or a copy that an editor keeps"),
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file with texts."""

    path: Path
    kind: str
    """`text`, `jsonl`, `parquet`, `arrow` or `wiki`."""
    size: int
    """Bytes on the disk."""
    time: int
    """Of its last change, nanoseconds."""
    digest: str
    """Of its size, its first and its last 64 KiB: 16 hex digits."""
    compression: str
    """Its suffix, such as `.gz`; "" for none."""
    source: int = 0
    """Which of the sources it belongs to."""

    @property
    def label(self) -> str:
        """What it is, for people: `.jsonl.gz`."""
        names = {"wiki": "MediaWiki .xml", "text": ".txt"}
        return f"{names.get(self.kind, f'.{self.kind}')}{self.compression}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One file or folder that is not used."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What the sources hold, in the order in which documents are read."""

    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...]

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells later whether a file has changed."""
        return [
            {"path": str(file.path.absolute()), "size": file.size, "time": file.time, "digest": file.digest}
            for file in self.files
        ]


def survey(paths: Iterable[Path]) -> Survey:
    """All files of some sources, each a file or a folder.

    Raises:
        DataError: A source is not there, may not be read, is of an unknown kind, or is a folder without any text file.
    """
    files: list[SourceFile] = []
    left_out: list[LeftOut] = []
    seen: dict[tuple[int, int], Path] = {}
    for source, path in enumerate(paths):
        found = list(_folder(path, seen)) if path.is_dir() else [_named(path, seen)]
        used = [replace(item, source=source) for item in found if isinstance(item, SourceFile)]
        files += used
        left_out += [item for item in found if isinstance(item, LeftOut)]
        if not used and path.is_dir():
            raise _no_files(path, left_out)
    return Survey(tuple(files), tuple(left_out))


def changes(before: list[dict[str, Any]], paths: Iterable[Path]) -> list[str]:
    """How sources differ from what `Survey.fingerprint` noted; a file that only has another time is the same.

    A file that is gone is said, but texts that a stage has used need not stay.
    """
    known = {row["path"]: row for row in before}
    try:
        now = {row["path"]: row for row in survey(paths).fingerprint()}
    except DataError as error:
        return [error.what]
    found = [
        f"{path}: {_difference(known[path], row)}"
        for path, row in now.items()
        if path in known and (row["size"], row["digest"]) != (known[path]["size"], known[path]["digest"])
    ]
    found += [f"{path}: new" for path in now if path not in known]
    return found + [f"{path}: gone" for path in known if path not in now]


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    if old["size"] != new["size"]:
        return f"{old['size']:,} bytes then, {new['size']:,} now"
    return "other content of the same size"


def _no_files(path: Path, left_out: list[LeftOut]) -> DataError:
    reasons = sorted({item.reason for item in left_out})
    found = f" ({'; '.join(reasons)})" if reasons else ""
    return DataError(f"{path}: no readable file below this folder{found}", rule=f"kinds: {KINDS}")


def _named(path: Path, seen: dict[tuple[int, int], Path]) -> SourceFile | LeftOut:
    """A file that the recipe names itself: what cannot be used is an error."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder", remedy="see to data.sources in the recipe")
    item = _judge(path, str(path), seen)
    if isinstance(item, LeftOut) and not item.reason.startswith("the same file"):
        if kind_of(path) is None:
            raise DataError(f"{path}: cannot tell what this file holds from its name", rule=f"kinds: {KINDS}")
        raise DataError(f"{path}: {item.reason}", rule=f"a file with texts; kinds: {KINDS}")
    return item


def _folder(root: Path, seen: dict[tuple[int, int], Path]) -> Iterator[SourceFile | LeftOut]:
    left_out: list[LeftOut] = []
    inside = sorted(_walk(root, Path(), set(), left_out))
    wanted = arrow_folder.wanted(root, inside)
    for relative in inside:
        if any(part.startswith(".") for part in relative.parts):
            left_out.append(LeftOut(str(relative), _HIDDEN))
        elif any(part in _TOOL_FOLDERS for part in relative.parts[:-1]):
            left_out.append(LeftOut(str(relative), "kept by another tool beside its data"))
        elif (reason := wanted.get(relative)) is not None:
            left_out.append(LeftOut(str(relative), reason))
        else:
            yield _judge(root / relative, str(relative), seen)
    yield from left_out


def _walk(root: Path, relative: Path, above: set[tuple[int, int]], left_out: list[LeftOut]) -> Iterator[Path]:
    """Every file below a folder, links followed; what cannot be entered goes to `left_out`."""
    folder = root / relative
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        if relative == Path():
            raise DataError(f"{folder}: {error.strerror}", remedy="see to data.sources in the recipe") from error
        left_out.append(LeftOut(f"{relative}/", _UNREADABLE if isinstance(error, PermissionError) else _why(error)))
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        left_out.append(LeftOut(f"{relative}/", "a link to a folder that it lies in"))
        return
    for entry in entries:
        path = relative / entry.name
        try:
            is_folder = entry.is_dir()
        except OSError:
            is_folder = False
        if is_folder:
            yield from _walk(root, path, above | {identity}, left_out)
        else:
            yield path


def _judge(path: Path, shown: str, seen: dict[tuple[int, int], Path]) -> SourceFile | LeftOut:
    """Whether a file can be used."""
    try:
        found = _used(path, seen)
    except PermissionError:
        found = _UNREADABLE
    except OSError as error:
        found = "a link to nothing" if path.is_symlink() else _why(error)
    return LeftOut(shown, found) if isinstance(found, str) else found


def _used(path: Path, seen: dict[tuple[int, int], Path]) -> SourceFile | str:
    """A file as far as its name and first bytes tell; the reason where it cannot be used."""
    status = path.stat()
    kind = kind_of(path)
    identity = (status.st_dev, status.st_ino)
    if not path.is_file():
        return "no regular file"
    if kind is None:
        return _other(path.name)
    if identity in seen:
        return f"the same file as {seen[identity].name}"
    head, digest = _ends(path, status.st_size)
    compression = _compression(path, head)
    if reason := _contradiction(path, kind, head, compression):
        return reason
    seen[identity] = path
    return SourceFile(path, kind, status.st_size, status.st_mtime_ns, digest, compression)


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def kind_of(path: Path) -> str | None:
    """What a file holds by its name; None when the name does not tell."""
    name = path.name.lower()
    compressed = path.suffix.lower() in SUFFIXES
    if compressed:
        name = name[: -len(path.suffix)]
    if _TOOL_FILES.fullmatch(name):
        return None
    if re.search(r"\.xml(-|\.|$)", name):
        return "wiki"
    suffixes = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
    kind = next((kind for suffix, kind in suffixes.items() if name.endswith(suffix)), None)
    return None if compressed and kind in ("parquet", "arrow") else kind


def _other(name: str) -> str:
    lower = name.lower()
    if _TOOL_FILES.fullmatch(lower.rpartition(".")[0] if Path(lower).suffix in SUFFIXES else lower):
        return "kept by another tool beside its data"
    for pattern, reason in _OTHERS:
        if re.search(pattern, lower):
            return reason
    suffix = Path(lower).suffix
    return f"kind unknown ({suffix})" if suffix else "kind unknown (no suffix)"


def _ends(path: Path, size: int) -> tuple[bytes, str]:
    """The first bytes, and the digest of size, first and last bytes."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(max(size - _HEAD, 0))
        tail = file.read(_HEAD)
    return head, hashlib.sha256(b"%d:" % size + head + tail).hexdigest()[:16]


def _compression(path: Path, head: bytes) -> str:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return suffix
    return next((name for name, magic in MAGIC.items() if head.startswith(magic)), "")


def _contradiction(path: Path, kind: str, head: bytes, compression: str) -> str:
    """Why the first bytes do not hold what the name says; "" if they do, or if reading will tell better."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (get the file itself with `git lfs pull`)"
    if kind in ("parquet", "arrow"):
        return ""
    if compression:
        try:
            with opened(path, compression) as stream:
                head = stream.read(_HEAD)
        except PermissionError:
            raise
        except Exception:  # a damaged file: the one that reads it says so
            return ""
    if kind == "wiki":
        # Comments, the XML declaration and a DOCTYPE may come before the outermost element.
        match = re.search(rb"<(?![?!])(?:[\w.-]+:)?([\w.-]+)", re.sub(rb"<!--.*?-->", b"", head, flags=re.DOTALL))
        if match is not None and match[1] != b"mediawiki":
            return f"its outermost element is <{match[1].decode()}>, not that of a MediaWiki export, <mediawiki>"
    elif b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "binary data under the name of a text"
    return ""
