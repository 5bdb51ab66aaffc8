"""Install each pinned set, run the tiny recipe with it, and write the table of `docs/compatibility.md`.

    python tests/compat/matrix.py [--folder .compat] [--python 3.12=/path/to/python3.12 ...] [--set "Python 3.13" ...]

Environments are made once and kept under the folder; the first set is the one that results are compared with. With
`--set` only those are tried, and their table is printed and not written.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/compatibility.md"
BEGIN, END = "<!-- written by make compat -->", "<!-- end -->"
CONSTRAINTS = ROOT / "tests/compat/constraints"


@dataclass(frozen=True)
class PinnedSet:
    """An interpreter and the file that pins what is installed into it."""

    name: str
    python: str
    constraints: Path


SETS = (
    PinnedSet("reference", "3.11", ROOT / "constraints.txt"),
    PinnedSet("Debian 12's Python", "3.11.2", ROOT / "constraints.txt"),
    PinnedSet("older NeMo", "3.11", CONSTRAINTS / "nemo2.7.3-mcore0.15.3-py311.txt"),
    PinnedSet("newer Megatron", "3.12", CONSTRAINTS / "nemo3.0.0-mcore0.19.2-py312.txt"),
    PinnedSet("Python 3.13", "3.13", ROOT / "constraints.txt"),
)


def main() -> int:
    """Returns 1 if a set fails; the table then says so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".compat", help="environments and runs")
    parser.add_argument("--python", action="append", default=[], metavar="VERSION=PATH", help="an interpreter")
    parser.add_argument("--set", action="append", default=[], choices=[pinned.name for pinned in SETS], help="only it")
    args = parser.parse_args()
    interpreters = {pinned.python: f"python{pinned.python}" for pinned in SETS}
    interpreters |= dict(item.split("=", 1) for item in args.python)
    folder = args.folder.resolve()
    wanted = [pinned for pinned in SETS if not args.set or pinned.name in args.set]
    results = {pinned.name: attempt(pinned, interpreters[pinned.python], folder) for pinned in wanted}
    text = table(results)
    print(text)
    if args.set:
        return int(any("failed" in result for result in results.values()))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0 if all("failed" not in result for result in results.values()) else 1


def attempt(pinned: PinnedSet, interpreter: str, folder: Path) -> dict[str, Any]:
    """What `check.py` found, or `{"failed": command}`; its output is in `FOLDER/SET/log`."""
    place = folder / pinned.name.replace(" ", "_").replace("'", "")
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").unlink(missing_ok=True)
    inputs = folder / "inputs"
    print(f"{pinned.name}: {place}/log", flush=True)
    python = place / "venv/bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", pinned.constraints]
    with (place / "log").open("w") as log:
        try:
            if not python.exists():
                call(log, interpreter, "-m", "venv", place / "venv")
            # First and on its own, so that an index with a build for CPU can give that one.
            call(log, *pip, "torch")
            call(log, *pip, "--editable", ".[train]")
            if not (inputs / "corpus").is_dir():
                call(log, python, "-m", "tests.compat.inputs", inputs)
            call(log, "rm", "-rf", place / "out")
            call(log, python, "tests/compat/check.py", inputs, place / "out")
        except subprocess.CalledProcessError as error:
            return {"failed": " ".join(map(str, error.cmd[-3:]))}
    return json.loads((place / "out/result.json").read_text())


def call(log: Any, *command: Any) -> None:
    """Run in the repository, output to the log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The page's table, in Markdown."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = [
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}, on CPU:",
        "",
        "| | Python | NeMo | Megatron-Core | torch | transformers | loss, first to last step | against the reference "
        "| TP 2, PP 2 against one rank | `.nemo` restored, twice, against Hugging Face |",
        "| --- | --- | --- | --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    reference = next(iter(results.values())).get("losses", {}).get("one rank")
    return "\n".join(rows + [row(name, result, reference) for name, result in results.items()])


def row(name: str, result: dict[str, Any], reference: list[float] | None) -> str:
    """One line of the table."""
    if "failed" in result:
        return f"| {name} | **failed**: `{result['failed']}` |" + " |" * 8
    versions, losses = result["versions"], result["losses"]
    cells = [name, *(versions[key] for key in ("python", "nemo-toolkit", "megatron-core", "torch", "transformers"))]
    one = losses["one rank"]
    cells.append(f"{one[0]:.5f} to {one[-1]:.5f}")
    cells.append("-" if reference is None else f"{furthest(one, reference):.1e}")
    cells.append(", ".join(f"{furthest(losses[layout], one):.1e}" for layout in ("TP 2", "PP 2")))
    cells.append(f"{result['restored']:.1e}")
    return f"| {' | '.join(cells)} |"


def furthest(left: list[float], right: list[float]) -> float:
    """Largest absolute difference."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


if __name__ == "__main__":
    sys.exit(main())
