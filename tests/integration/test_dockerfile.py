"""The Dockerfile without a container engine: its install steps in a virtual environment that has what NGC's image has.

That environment links the libraries of this one. Those that must stay as they are claim versions of a vendor's build,
which no index has and no constraint allows: a step that resolved dependencies would replace them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = "/opt/nemo_minitron"
OURS = ("annotated_doc", "gguf", "mwparserfromhell", "nemo_minitron", "shellingham", "typer")
KEPT = {"torch": "2.9.0a0+nv", "nemo-toolkit": "2.6.0rc0+nv", "megatron-core": "0.15.0rc8+nv", "lightning": "2.4.0+nv"}


def steps() -> list[tuple[str, str]]:
    """Instructions and what they are given; lines that go on joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, rest in lines]


def test_base_is_pinned_and_nobody_is_root():
    found = dict(steps())
    name, _, tag = found["ARG"].rpartition(":")
    assert found["FROM"] == "${BASE_IMAGE}"
    assert name.startswith("BASE_IMAGE=nvcr.io/")
    assert tag != "latest"
    order = [instruction for instruction, _ in steps()]
    assert found["USER"] != "root"
    assert order.index("USER") < order.index("CMD")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """An environment with the libraries of this one, but those that the Dockerfile installs."""
    folder = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    here = Path(sysconfig.get_paths()["purelib"])
    there = folder / "env" / here.relative_to(sys.prefix)
    vendors = {metadata.distribution(name)._path.name: (name, version) for name, version in KEPT.items()}
    for entry in here.iterdir():
        if entry.name.startswith((*OURS, "__editable__", "pip", "_distutils", "distutils")) or entry.suffix == ".pth":
            continue
        if entry.name in vendors:
            _pretend(entry, there, *vendors[entry.name])
        elif not (there / entry.name).exists():
            (there / entry.name).symlink_to(entry)
    kept = shutil.ignore_patterns(*(ROOT / ".dockerignore").read_text().replace("**/", "").split())
    shutil.copytree(ROOT, folder / "source", ignore=kept)
    return folder


def _pretend(entry: Path, there: Path, name: str, version: str) -> None:
    target = there / f"{name.replace('-', '_')}-{version}.dist-info"
    shutil.copytree(entry, target)
    about = (
        (target / "METADATA").read_text().replace(f"\nVersion: {metadata.version(name)}\n", f"\nVersion: {version}\n")
    )
    (target / "METADATA").write_text(about)


def run(image: Path, command: str) -> "subprocess.CompletedProcess[str]":
    """A step as the image's shell would run it."""
    environment = os.environ | {
        "PATH": f"{image / 'env/bin'}:{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    environment.pop("PYTHONPATH", None)
    command = command.replace(SOURCE, str(image / "source"))
    return subprocess.run(
        ["bash", "-c", command], env=environment, cwd=image, capture_output=True, text=True, check=False
    )


def installed(image: Path) -> dict[str, str]:
    ended = run(image, "python -m pip list --format=freeze")
    assert ended.returncode == 0, ended.stderr
    return dict(line.split("==") for line in ended.stdout.splitlines())


@pytest.mark.slow
def test_install_steps_add_ours_and_touch_nothing_else(image):
    before = installed(image)
    assert KEPT.items() <= before.items()
    commands = [rest for name, rest in steps() if name == "RUN" and "pip install" in rest]
    for command in commands:
        ended = run(image, command)
        assert ended.returncode == 0, ended.stderr

    after = installed(image)
    assert {name: after[name] for name in before} == before
    assert {name.replace("-", "_") for name in after.keys() - before.keys()} == set(OURS)
    for command in (rest for name, rest in steps() if name == "RUN" and "doctor" in rest):
        ended = run(image, command)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert shlex.split(run(image, "nemo-minitron --version").stdout) == [metadata.version("nemo_minitron")]

    next(image.rglob("site-packages/lightning")).unlink()
    ended = run(image, "nemo-minitron doctor --strict")
    assert ended.returncode == 2
    assert re.search("needed and missing: .*lightning", ended.stdout), ended.stdout
