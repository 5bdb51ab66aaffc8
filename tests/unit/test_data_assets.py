"""Files inside packages, with packages made here and pip kept off the network."""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from nemo_minitron.data.assets import default_cache, resolve
from nemo_minitron.errors import AssetError

STORY = b"Once upon a time.\n" * 40
SHA256 = hashlib.sha256(STORY).hexdigest()


def write_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/texts/story.txt", STORY)
        wheel.writestr(f"{name}/texts/poem.txt", b"Roses are red.")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is all pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("NEMO_MINITRON_CACHE", str(tmp_path / "cache"))
    write_wheel(folder, "tinytexts", "1.0")
    return folder


def test_a_plain_path_passes_through():
    assert resolve("texts/a.txt") == Path("texts/a.txt")
    assert resolve("~/a.txt") == Path.home() / "a.txt"


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("NEMO_MINITRON_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "nemo_minitron"
    monkeypatch.setenv("NEMO_MINITRON_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"


def test_a_file_is_fetched_once_and_then_needs_no_index(index):
    uri = f"package:TinyTexts==1.0/tinytexts/texts/story.txt#sha256={SHA256}"
    path = resolve(uri)
    assert path.read_bytes() == STORY
    assert path.name == "story.txt"
    (index / "tinytexts-1.0-py3-none-any.whl").unlink()
    assert resolve(uri) == path
    assert not [item for item in path.parents[2].rglob("*.whl")], "the package itself is not kept"


def test_a_folder_is_whole_even_when_one_of_its_files_was_fetched_before(index):
    resolve("package:tinytexts==1.0/tinytexts/texts/poem.txt")
    folder = resolve("package:tinytexts==1.0/tinytexts/texts")
    assert sorted(path.name for path in folder.iterdir()) == ["poem.txt", "story.txt"]


def test_a_source_archive_serves_when_there_is_no_wheel(index, tmp_path):
    root = tmp_path / "oldtexts-2.0"
    (root / "oldtexts").mkdir(parents=True)
    (root / "oldtexts" / "story.txt").write_bytes(STORY)
    (root / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: oldtexts\nVersion: 2.0\n")
    # Its own build backend, so that pip needs to fetch none.
    (root / "backend.py").write_text(
        "import os\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    os.mkdir(folder + '/oldtexts-2.0.dist-info')\n"
        "    with open(folder + '/oldtexts-2.0.dist-info/METADATA', 'w') as file:\n"
        "        file.write('Metadata-Version: 2.1\\nName: oldtexts\\nVersion: 2.0\\n')\n"
        "    return 'oldtexts-2.0.dist-info'\n"
        "def build_wheel(*args): raise RuntimeError\n"
    )
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    with tarfile.open(index / "oldtexts-2.0.tar.gz", "w:gz") as archive:
        archive.add(root, arcname="oldtexts-2.0")
    assert resolve("package:oldtexts==2.0/oldtexts/story.txt").read_bytes() == STORY


def test_two_processes_at_once_fetch_once(index):
    script = (
        "import logging, sys\n"
        "from nemo_minitron.data.assets import resolve\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s')\n"
        "print(resolve('package:tinytexts==1.0/tinytexts/texts/story.txt').read_bytes().count(b'Once'))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [text.splitlines()[-1] for text in said] == ["40"] * 3
    assert "".join(said).count("fetching") == 1


def test_a_missing_file_lists_near_names(index):
    with pytest.raises(AssetError, match=r"no such file\n.*tinytexts/texts/story\.txt"):
        resolve("package:tinytexts==1.0/tinytexts/text/storey.txt")


def test_a_missing_version_lists_those_there_are(index):
    with pytest.raises(AssetError, match=r"no such version\n.*1\.0"):
        resolve("package:tinytexts==9.9/tinytexts/texts/story.txt")


def test_a_missing_package_is_said_to_be_missing(index):
    with pytest.raises(AssetError, match="no such package"):
        resolve("package:nosuchpackage==1.0/a.txt")


def test_a_wrong_checksum_is_refused_every_time(index):
    uri = f"package:tinytexts==1.0/tinytexts/texts/story.txt#sha256={'0' * 64}"
    for _ in range(2):
        with pytest.raises(AssetError, match=f"SHA-256 is {SHA256}"):
            resolve(uri)


def test_no_network_is_said_to_be_no_network(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(AssetError, match="does not answer"):
        resolve("package:tinytexts==1.0/tinytexts/texts/story.txt")


def test_a_damaged_package_leaves_nothing_behind(index, tmp_path):
    wheel = index / "tinytexts-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    start = content.index(b"Once upon")
    content[start : start + 4] = b"XXXX"
    wheel.write_bytes(content)
    with pytest.raises(AssetError, match="damaged"):
        resolve("package:tinytexts==1.0/tinytexts/texts/story.txt")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize(
    "uri",
    [
        "package:tinytexts/a.txt",
        "package:tinytexts==1.0",
        "package:tinytexts==1.0/../../etc/passwd",
        "package:tinytexts==1.0//etc/passwd",
        "package:tinytexts==1.0/a.txt#sha256=12",
        "package:--index-url==1.0/a.txt",
    ],
)
def test_a_malformed_address_says_what_one_looks_like(uri):
    with pytest.raises(AssetError, match="NAME==VERSION/PATH"):
        resolve(uri)
