"""Whether two commits compute the same, bit for bit: the tiny recipe from scores to export, and SmolLM2's if asked.

    python -m benchmarks.same_numbers OLD NEW [--only ramp --only cache] [--smollm2]

Each commit is checked out into a temporary folder and runs the stages there, in fp32 on one CPU thread.

- `chain`: everything up to the export, `layers` the same with merged layers and depth measured. Compared are every
  score, the plan, the pruned weights, every number of metrics.jsonl but times, and the exported weights and
  configurations.
- every objective below, up to distillation: every number of metrics.jsonl, every file of the student's weights.
- `smollm2`: the chain of recipes/smollm2/demo.yaml with 20 steps of distillation (fetches the model and the texts).

What tells where a model comes from is left out: `family`, and digests of architectures and plans, which other commits
may define otherwise. The script ends with status 1 where anything else differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHAINS: dict[str, list[str]] = {
    "chain": [],
    "layers": [
        *("target={num_layers: 3, depth_metric: lm_loss, merge_layers: true, ffn_hidden_size: 64}",),
        *("score.depth={metrics: [lm_loss], samples: 4}",),
    ],
}
"""Complete chains of the tiny recipe, as overrides of it."""
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
SMOLLM2 = ["precision=fp32", "distill.minutes=null", "distill.tokens=10240", "evaluate.max_tokens=2048"]
TIMES = ("tokens_per_second", "seconds", "time", "elapsed", "mfu", "memory")
ORIGIN = ("family", "minitron", "provenance", "spec_digest", "_name_or_path")
"""Keys of what tells where a model comes from."""


def main() -> None:
    """Run both, print a row for each chain and objective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--only", action="append", choices=[*CHAINS, *OBJECTIVES], help="a part; all if not given")
    parser.add_argument("--smollm2", action="store_true", help="the chain of recipes/smollm2/demo.yaml too")
    args = parser.parse_args()
    wanted = args.only or [*CHAINS, *OBJECTIVES]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _python(ROOT, _INPUTS, str(folder))
        old, new = (_results(commit, folder, wanted, smollm2=args.smollm2) for commit in args.commits)
    same = True
    for name, before in old.items():
        differing = [key for key in {**before, **new[name]} if before.get(key) != new[name].get(key)]
        same = same and not differing
        losses = [found["losses"] for found in (before, new[name])]
        print(f"{name:12} {len(losses[0])} losses, last {losses[0][-1]!r} and {losses[1][-1]!r}: ", end="")
        print(f"DIFFERENT: {', '.join(differing[:5])}" if differing else f"equal, {_counted(before)}")
    sys.exit(0 if same else 1)


_INPUTS = """
import sys
from pathlib import Path
from tests.tiny import write_corpus, write_llama
write_llama(Path(sys.argv[1]) / "model", trained_steps=60)
write_corpus(Path(sys.argv[1]) / "texts")
"""


def _counted(found: dict[str, Any]) -> str:
    kinds: dict[str, int] = {}
    for key in found:
        kind = key.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _results(commit: str, folder: Path, wanted: list[str], *, smollm2: bool) -> dict[str, dict[str, Any]]:
    tree = folder / f"tree-{commit.replace('/', '_')}"
    subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True, capture_output=True)
    try:
        runs = folder / f"runs-{tree.name}"
        given = [f"model.source={folder / 'model'}", f"data.sources=[{folder / 'texts'}]"]
        found = {name: _chain(tree, [*given, *CHAINS[name]], runs / name) for name in wanted if name in CHAINS}
        objectives = [name for name in wanted if name in OBJECTIVES]
        if objectives:
            _run(tree, "prune", given, runs / "pruned")
        found |= {name: _distilled(tree, name, given, runs) for name in objectives}
        if smollm2:
            found["smollm2"] = _chain(tree, SMOLLM2, runs / "smollm2", recipe="smollm2/demo.yaml")
        return found
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True, capture_output=True)


def _chain(tree: Path, overrides: list[str], run: Path, *, recipe: str = "tiny/tiny_cpu.yaml") -> dict[str, Any]:
    """Everything that a chain leaves, up to its export."""
    _run(tree, "export", overrides, run, recipe=recipe)
    stages = run / "stages"
    plan = json.loads((stages / "prune" / "plan.json").read_text())
    found = _trained(stages / "distill") | {"plan": _without_origin(plan)}
    found |= dict(_tensors(stages / "score" / "scores.safetensors", "score"))
    found |= dict(_weights(stages / "prune" / "student", "pruned"))
    for path in sorted((stages / "export").rglob("*")):
        name = f"export/{path.relative_to(stages / 'export')}"
        if path.suffix == ".safetensors":
            found |= dict(_tensors(path, name))
        elif path.name == "config.json":
            found[name] = _without_origin(json.loads(path.read_text()))
        elif path.suffix == ".nemo":
            found |= dict(_members(path, name))
    return found


def _distilled(tree: Path, name: str, given: list[str], runs: Path) -> dict[str, Any]:
    run = Path(shutil.copytree(runs / "pruned", runs / name.replace(" ", "_")))
    _run(tree, "distill", [*given, *OBJECTIVES[name]], run)
    return _trained(run / "stages" / "distill")


def _trained(stage: Path) -> dict[str, Any]:
    """Losses, all rows without times, and the student's weights of a stage that trains."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in row.items() if not any(word in key for word in TIMES)} for row in rows]
    losses = [row["train/loss"] for row in numbers if "train/loss" in row]
    weights = dict(_weights(stage / "student", "weights"))
    if not losses or not weights:
        sys.exit(f"{stage} has no losses or no weights")
    return {"losses": losses, "rows": numbers, **weights}


def _weights(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix == ".distcp"):
        yield f"{name}/{path.relative_to(folder)}", hashlib.sha256(path.read_bytes()).hexdigest()


def _tensors(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Type, shape and bytes of every tensor of a safetensors file, by its specification."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            yield f"{name}/{key}", (entry["dtype"], entry["shape"], hashlib.sha256(data[begin:end]).hexdigest())


def _members(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None or member.name.endswith(("README.md", "minitron_plan.json")):
                continue
            content = file.read()
            is_config = member.name.endswith("model_config.yaml")
            yield (
                f"{name}/{member.name}",
                _without_origin(yaml.safe_load(content)) if is_config else hashlib.sha256(content).hexdigest(),
            )


def _without_origin(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_origin(value) for key, value in data.items() if key not in ORIGIN}
    return [_without_origin(value) for value in data] if isinstance(data, list) else data


def _run(tree: Path, verb: str, overrides: list[str], run: Path, *, recipe: str = "tiny/tiny_cpu.yaml") -> None:
    path = tree / "recipes" / recipe
    _python(tree, "from nemo_minitron.cli.main import main; main()", verb, str(path), *overrides, "--run-dir", str(run))


def _python(tree: Path, code: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.exit(f"{tree}: {' '.join(arguments)}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")


if __name__ == "__main__":
    main()
