"""What one environment of the matrix is asked: the tiny recipe on one rank and on two, and its exports read back.

    python tests/compat/check.py INPUTS OUT

INPUTS holds `hf/` and `corpus/`. OUT gets the run folders and `result.json`. Imports nothing from `tests`: NeMo 2.7.3
installs a package of that name.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[2] / "recipes/tiny/tiny_cpu.yaml"
LAYOUTS = {"one rank": [], "TP 2": ["parallel.tensor=2"], "PP 2": ["parallel.pipeline=2"]}
TOKENS = 48


def main(inputs: Path, out: Path) -> None:
    """Write `out/result.json`: versions, losses of each layout, differences of the exports' logits."""
    from nemo_minitron.stages.manifest import versions

    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    minitron = [sys.executable, "-m", "nemo_minitron"]
    result: dict[str, Any] = {"versions": versions(), "losses": {}}
    result["doctor"] = subprocess.run([*minitron, "doctor"], capture_output=True, check=False).returncode
    for name, layout in LAYOUTS.items():
        run = out / name.replace(" ", "_")
        overrides = [f"model.source={inputs / 'hf'}", f"data.sources=[{inputs / 'corpus'}]", *layout]
        subprocess.run([*minitron, "run", str(RECIPE), *overrides, "--run-dir", str(run)], env=environment, check=True)
        result["losses"][name] = losses(run)
    first = out / "one_rank"
    result["perplexity"] = json.loads((first / "summary.json").read_text())["perplexity"]["distilled"]
    result["restored"] = restored_difference(first / "stages/export", out / "saved_again")
    (out / "result.json").write_text(json.dumps(result, indent=1))


def losses(run: Path) -> list[float]:
    """The training loss of every step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def restored_difference(export: Path, again: Path) -> float:
    """Largest difference between the logits of `tiny_hf` under transformers, and of `tiny.nemo` restored by NeMo, saved
    once more by NeMo's connector, and restored from that."""
    import torch
    from lightning.pytorch import Trainer
    from transformers import AutoModelForCausalLM

    from nemo_minitron import MegatronGPTModel, MegatronStrategy
    from nemo_minitron.evaluation.logits import gather_logits

    tokens = torch.randint(0, 256, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(export / "tiny_hf", dtype=torch.float32)(tokens).logits
    difference, path = 0.0, export / "tiny.nemo"
    for _ in range(2):
        trainer = Trainer(strategy=MegatronStrategy(), accelerator="cpu", devices=1, logger=False)
        model = MegatronGPTModel.restore_from(path, trainer=trainer).eval()
        found = gather_logits(model.chunks, tokens, model.runtime, model.spec.vocab_size)
        difference = max(difference, (found - expected).abs().max().item())
        path = again.with_suffix(".nemo")
        model.save_to(str(path))
    return difference


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
