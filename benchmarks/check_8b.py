"""Check an export of a synthetic Llama-3.1-8B as stage export does: layer by layer, under our layers and transformers'.

    python -m benchmarks.check_8b --json --work DIR

One line: `peak_rss_gb` of a fresh process that compares a Hugging Face folder with itself, `seconds`,
`largest_logit_difference`, `tokens`, `layers`, `threads`. In fp32 the model's weights would take 32 GB. Needs 16 GB of
disk in DIR, which is left as it was. `--layers 4` is the same with an eighth of the layers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS = 128
"""As stage export."""


def main() -> None:
    """Measure, or with `--job` be the process that is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder to work in; a new one is made inside and removed")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(check(args.job)))
        return
    with tempfile.TemporaryDirectory(dir=args.work, prefix="check_8b_") as name:
        model = [sys.executable, "-m", "benchmarks.synthetic_llama", f"{name}/hf", "--layers", str(args.layers)]
        subprocess.run(model, check=True, stderr=subprocess.DEVNULL)
        job = [sys.executable, "-m", "benchmarks.check_8b", "--job", f"{name}/hf"]
        found = json.loads(subprocess.run(job, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    found["layers"] = args.layers
    print(json.dumps(found) if args.json else "  ".join(f"{key} {value}" for key, value in found.items()))


def check(folder: Path) -> dict[str, float]:
    """The job: states of one folder under both implementations, and how far apart their logits are."""
    import torch

    from nemo_minitron.checkpoints.open import open_checkpoint
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.evaluation.difference import largest_difference
    from nemo_minitron.evaluation.states import megatron_states, transformers_states
    from nemo_minitron.megatron import runtime
    from nemo_minitron.stages.manifest import peak_memory_gb

    here = runtime.start(ParallelConfig(), seed=0)
    tokens = torch.randint(0, 128256, (1, TOKENS), generator=torch.Generator().manual_seed(1234))
    started = time.monotonic()
    expected = megatron_states(open_checkpoint(folder), tokens, here)
    difference = largest_difference(expected, transformers_states(folder, tokens))
    return {
        "peak_rss_gb": peak_memory_gb(),
        "seconds": round(time.monotonic() - started, 1),
        "largest_logit_difference": difference,
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
