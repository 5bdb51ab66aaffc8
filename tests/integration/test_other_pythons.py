"""The tiny chain and the readers under another patch version of the same Python, such as Debian 12's own 3.11.2.

The other interpreter borrows the packages of this one: compiled modules fit every patch version of a minor version.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.checkpoints.open import open_checkpoint
from tests.tiny import write_corpus, write_llama

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
VERSION = "import platform; print(platform.python_version())"
READERS = ("test_checkpoints_megatron_formats.py", "test_checkpoints_pythons.py")


def other_interpreter() -> str | None:
    """A Python of this minor version and another patch version, from the places where systems keep theirs."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin"):
        found = shutil.which(name, path=folder)
        if found is None:
            continue
        version = subprocess.run([found, "-c", VERSION], capture_output=True, text=True, check=True).stdout.strip()
        if version != sys.version.split()[0]:
            return found
    return None


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An environment of the other interpreter with this one's packages."""
    found = other_interpreter()
    if found is None:
        pytest.skip(f"no other Python {sys.version_info.major}.{sys.version_info.minor} in the system's folders")
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([found, "-m", "venv", "--without-pip", folder], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return str(folder / "bin/python")


def call(python: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_the_tiny_chain_runs_and_leaves_the_same_bytes(python, tmp_path):
    write_llama(tmp_path / "hf", trained_steps=5)
    write_corpus(tmp_path / "corpus")
    recipe = ROOT / "recipes/tiny/tiny_cpu.yaml"
    keys = (f"model.source={tmp_path / 'hf'}", f"data.sources=[{tmp_path / 'corpus'}]", "distill.tokens=2048")
    runs = {}
    for name, interpreter in {"other": python, "own": sys.executable}.items():
        run = runs[name] = tmp_path / name
        done = call(interpreter, "-m", "nemo_minitron", "run", recipe, *keys, "--run-dir", run)
        assert done.returncode == 0, done.stdout + done.stderr
    versions = {
        name: json.loads((run / "manifest.json").read_text())["versions"]["python"] for name, run in runs.items()
    }
    assert versions["other"] != versions["own"]
    for folder in ("import/teacher", "prune/student", "distill/student"):
        ours, theirs = (run / "stages" / folder / "model_weights" for run in (runs["own"], runs["other"]))
        assert (ours / ".metadata").read_bytes() == (theirs / ".metadata").read_bytes()
        checkpoint = open_checkpoint(theirs.parent)
        assert checkpoint.spec == open_checkpoint(ours.parent).spec


@pytest.mark.timeout(900)
def test_the_readers_pass_their_tests(python):
    tests = [ROOT / "tests/unit" / name for name in READERS]
    done = call(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout.splitlines()[-1]
