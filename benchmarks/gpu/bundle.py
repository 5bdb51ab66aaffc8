"""Collects the wheels that `make gpu` needs on a machine without a package index: `make gpu-bundle DIR=bundle`.

    python -m benchmarks.gpu.bundle bundle                        # what make gpu needs beside torch
    python -m benchmarks.gpu.bundle bundle --sets base nemo model  # the demo too
    python -m benchmarks.gpu.bundle bundle --sets base engine      # Transformer Engine too
    python -m benchmarks.gpu.bundle bundle --sets base peers       # ModelOpt and Liger, to compare with

The other machine has Python 3.12 on x86-64 Linux with torch, triton, numpy, safetensors, transformers, lightning and
pytest, and what those need. Everything else is carried, at the versions of `constraints.txt`, as wheels that need no
compiler, in parts of a limited size: folders `part-1`, `part-2` and so on, where a larger file is cut into pieces.
There: copy all parts into one folder, then

    sh install.sh SITE            # joins the pieces, checks every digest, installs what is not there yet
    PYTHONPATH=SITE:$PYTHONPATH make gpu

Transformer Engine's kernels come compiled; its binding for torch comes as source and is compiled there, against that
machine's torch (`sh engine.sh SITE`, some minutes, needs nvcc).
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import bundle_scripts
from benchmarks.gpu.runner import ROOT

PYTHON = "3.12"
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 26, 24, 17, 12, 5)),
    *("manylinux2014_x86_64", "manylinux1_x86_64"),
)

SETS: dict[str, tuple[str, ...]] = {
    # The first line is what the checks import; the rest is for the command line: doctor, recipes, the estimate.
    "base": (
        *("megatron-core", "packaging", "psutil", "einops"),
        *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),
        *("PyYAML", "omegaconf", "antlr4-python3-runtime", "filelock"),
        *("typer", "annotated-doc", "shellingham", "rich", "markdown-it-py", "mdurl", "Pygments"),
        *("Jinja2", "MarkupSafe"),
    ),
    "nemo": (
        *("nemo-toolkit", "hydra-core", "lightning", "lightning-utilities", "torchmetrics", "cloudpickle"),
        *("text-unidecode", "wrapt", "smart_open", "sentencepiece", "gguf", "mwparserfromhell"),
        *("nv-one-logger-core", "nv-one-logger-training-telemetry", "nv-one-logger-pytorch-lightning-integration"),
        *("braceexpand", "webdataset", "overrides", "StrEnum", "toml"),
    ),
}
"""Distributions of each set, under their names in `constraints.txt`."""
AS_SOURCE = ("antlr4-python3-runtime",)
"""Published as source only: built here, which must give a wheel for every platform."""

PEERS = ("nvidia-modelopt==0.47.0", "liger-kernel==0.8.5", "pulp==3.3.2")
"""What the losses are compared with, and what it imports that the other machine lacks."""

ENGINE_VERSION = "2.9.0"
ENGINE = (f"transformer_engine=={ENGINE_VERSION}", f"transformer_engine_cu13=={ENGINE_VERSION}")
ENGINE_SOURCE = f"transformer_engine_torch=={ENGINE_VERSION}"
ENGINE_NEEDS = ("onnx", "onnxscript", "nvdlfw-inspect")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made anew")
    parser.add_argument("--sets", nargs="+", choices=("base", "nemo", "model", "engine", "peers"), default=["base"])
    parser.add_argument("--megabytes", type=float, default=60.0, help="of a part, at most (60)")
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        sys.exit(f"{args.folder} is not empty")
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch)
        for name in args.sets:
            collect(name, files)
        sizes = pack(files, args.folder, int(args.megabytes * 1e6))
    for part, size in sizes.items():
        print(f"{args.folder / part}: {size / 1e6:.1f} MB")
    print(f"{sum(sizes.values()) / 1e6:.1f} MB in all")


def collect(name: str, folder: Path) -> None:
    """Fetch a set's files into a folder."""
    if name == "model":
        return _model(folder)
    if name == "engine":
        return _engine(folder)
    if name == "peers":
        return download(PEERS, folder)
    versions = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    wanted = [f"{each}=={versions[_normal(each)]}" for each in SETS[name] if each not in AS_SOURCE]
    download(wanted, folder)
    for each in set(SETS[name]) & set(AS_SOURCE):
        build_pure(f"{each}=={versions[_normal(each)]}", folder)


def pinned(constraints: str) -> dict[str, str]:
    """Versions by normalised name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", constraints, re.MULTILINE)
    return {_normal(name): version for name, version in found}


def download(wanted: Sequence[str], folder: Path) -> None:
    """Wheels for the other machine's Python and platform, without what they need."""
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    target = ["--python-version", PYTHON, "--implementation", "cp", *platforms]
    _pip("download", "--no-deps", "--only-binary", ":all:", *target, "--dest", str(folder), *wanted)


def build_pure(wanted: str, folder: Path) -> None:
    """Build a wheel here that runs everywhere.

    Raises:
        SystemExit: It holds compiled code.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _pip("wheel", "--no-deps", "--wheel-dir", scratch, wanted)
        (wheel,) = Path(scratch).glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            sys.exit(f"{wheel.name} is for this machine alone")
        shutil.move(wheel, folder / wheel.name)


def _model(folder: Path) -> None:
    """The demo's model and texts, as the cache folder that they are found in."""
    import yaml

    from nemo_minitron.data.assets import resolve

    recipe = yaml.safe_load((ROOT / "recipes" / "smollm2" / "demo.yaml").read_text(encoding="utf-8"))
    cache = folder / "cache"
    for uri in (recipe["model"]["source"], *recipe["data"]["sources"]):
        resolve(uri, cache)
    shutil.make_archive(str(folder / "cache"), "tar", cache)
    shutil.rmtree(cache)


def _engine(folder: Path) -> None:
    download([*ENGINE, *ENGINE_NEEDS], folder)
    # Its build script asks for torch, so the build environment must be one that has it: this one.
    _pip("download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder), ENGINE_SOURCE)


def pack(files: Path, folder: Path, limit: int) -> dict[str, int]:
    """Spread files over parts of at most `limit` bytes, with digests and the scripts in the first; bytes of each part.

    A file that is larger than a part is cut into `NAME.piece-001` and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for path in files.iterdir() if path.is_file())
    digests = "".join(f"{sha256(path)}  {path.name}\n" for path in paths)
    extra = {"SHA256SUMS": digests, **bundle_scripts.SCRIPTS}
    sizes: dict[str, int] = {}

    def place(size: int) -> Path:
        fitting = (part for part, held in sizes.items() if held + size <= limit)
        part = next(fitting, f"part-{len(sizes) + 1}")
        sizes[part] = sizes.get(part, 0) + size
        (folder / part).mkdir(exist_ok=True)
        return folder / part

    for name, text in extra.items():
        (place(len(text.encode())) / name).write_text(text, encoding="utf-8")
    for path in sorted(paths, key=lambda each: each.stat().st_size, reverse=True):
        size = path.stat().st_size
        if size <= limit:
            shutil.copyfile(path, place(size) / path.name)
            continue
        with path.open("rb") as source:
            for number, piece in enumerate(iter(lambda source=source: source.read(limit), b""), start=1):
                (place(len(piece)) / f"{path.name}.piece-{number:03}").write_bytes(piece)
    return sizes


def sha256(path: Path) -> str:
    """Of a file's contents, in hex."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=False
    )
    if done.returncode:
        sys.exit(f"pip {arguments[0]} failed with status {done.returncode}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
