"""Whether two commits compute the same: losses of every step and the bytes of the students, on the tiny recipe.

    python -m benchmarks.same_numbers OLD NEW [--only ramp --only cache]

Each commit is checked out into a temporary folder and runs the stages up to distillation there, in fp32 on one CPU
thread, once for each objective below. Every number of metrics.jsonl but the times, and every file of the student's
weights, must be equal bit for bit; the script ends with status 1 where one is not.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OBJECTIVES: dict[str, list[str]] = {
    "forward KL": [],
    "ramp": [
        *("distill.divergence=reverse_kl", "distill.temperature=3", "distill.lm_weight=0.2"),
        "distill.ramp_to={temperature: 1, lm_weight: 0.5, kd_weight: 0.9}",
    ],
    "top k": ["distill.top_k=20", "distill.divergence=jensen_shannon", "distill.beta=0.3"],
    "hidden": ["distill.hidden={layers: [[-2, -2]], embedding: true, balance: same_step}", "distill.hidden_weight=0.7"],
    "offloaded": ["distill.offload_teacher=true", "distill.freeze_embeddings=true", "distill.loss_chunk_tokens=48"],
    "cache": ["cache={kind: top_k, k: 20}", "distill.temperature=2", "distill.lm_weight=0.1"],
}
"""What is trained, as overrides of the recipe."""
TIMES = ("tokens_per_second", "seconds", "time", "elapsed", "mfu", "memory")


def main() -> None:
    """Run both, print a row for each objective."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--only", action="append", choices=OBJECTIVES, help="an objective; all if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _python(ROOT, _INPUTS, str(folder))
        wanted = args.only or list(OBJECTIVES)
        old, new = (_results(commit, folder, wanted) for commit in args.commits)
    same = True
    for name in wanted:
        equal = old[name] == new[name]
        same = same and equal
        steps = len(old[name]["losses"])
        print(f"{name:12} {steps} losses, last {old[name]['losses'][-1]!r} and {new[name]['losses'][-1]!r}: ", end="")
        print("equal, weights too" if equal else "DIFFERENT")
    sys.exit(0 if same else 1)


_INPUTS = """
import sys
from pathlib import Path
from tests.tiny import write_corpus, write_llama
write_llama(Path(sys.argv[1]) / "model", trained_steps=60)
write_corpus(Path(sys.argv[1]) / "texts")
"""


def _results(commit: str, folder: Path, wanted: list[str]) -> dict[str, dict[str, Any]]:
    tree = folder / f"tree-{commit.replace('/', '_')}"
    subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True, capture_output=True)
    try:
        runs = folder / f"runs-{tree.name}"
        given = [f"model.source={folder / 'model'}", f"data.sources=[{folder / 'texts'}]"]
        _run(tree, "prune", given, runs / "pruned")
        return {name: _distilled(tree, name, given, runs) for name in wanted}
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True, capture_output=True)


def _distilled(tree: Path, name: str, given: list[str], runs: Path) -> dict[str, Any]:
    run = Path(shutil.copytree(runs / "pruned", runs / name.replace(" ", "_")))
    _run(tree, "distill", [*given, *OBJECTIVES[name]], run)
    stage = run / "stages" / "distill"
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in row.items() if not any(word in key for word in TIMES)} for row in rows]
    weights = sorted(path for path in (stage / "student").rglob("*") if path.is_file() and path.suffix == ".distcp")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    losses = [row["train/loss"] for row in numbers if "train/loss" in row]
    if not losses or not digests:
        sys.exit(f"{stage} has no losses or no weights")
    return {"losses": losses, "rows": numbers, "weights": digests}


def _run(tree: Path, verb: str, overrides: list[str], run: Path) -> None:
    recipe = tree / "recipes" / "tiny" / "tiny_cpu.yaml"
    _python(
        tree, "from nemo_minitron.cli.main import main; main()", verb, str(recipe), *overrides, "--run-dir", str(run)
    )


def _python(tree: Path, code: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.exit(f"{tree}: {' '.join(arguments)}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")


if __name__ == "__main__":
    main()
