"""Convert a synthetic Llama-3.1-8B to Megatron's torch_dist and back, against copying the bytes with the same disk.

    python -m benchmarks.convert_8b --json --work DIR

Two lines: Hugging Face safetensors to a checkpoint folder (an unpacked `.nemo`), and that folder to safetensors, whose
bytes are then compared with the first ones. Keys as in `benchmarks.prune_8b`. Needs 50 GB of disk in DIR, which is left
as it was. `--layers 4` is the same with an eighth of the layers.
"""

import argparse
import filecmp
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.copying import copy_past_the_cache, copy_seconds, job_seconds, nbytes
from benchmarks.synthetic_llama import SyntheticSource, llama_8b
from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.open import open_checkpoint

WRITERS = {"hf": write_hf, "torch_dist": write_folder}


def main() -> None:
    """Measure, or with `--job` be the process that is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder to work in; a new one is made inside and removed")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--job", nargs=3, metavar=("SOURCE", "FORMAT", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        source, kind, target = args.job
        WRITERS[kind](open_checkpoint(Path(source)), Path(target))
        return
    with tempfile.TemporaryDirectory(dir=args.work, prefix="convert_8b_") as name:
        work = Path(name)
        write_hf(SyntheticSource(llama_8b(args.layers)), work / "hf")
        for kind, source, target in (("torch_dist", "hf", "torch_dist"), ("hf", "torch_dist", "back")):
            result = contest(work / source, kind, work / target) | {"source": source, "target": kind}
            print(json.dumps(result) if args.json else _in_words(result), flush=True)
        check_same_weights(work / "hf", work / "back")


def contest(source: Path, kind: str, target: Path) -> dict[str, Any]:
    """Copy a folder, convert it, and copy it once more past the page cache."""
    copy = source.with_name("copy")
    plain = copy_seconds(source, copy)
    seconds, peak = job_seconds(["benchmarks.convert_8b", "--job", str(source), kind, str(target)], source)
    uncached = copy_seconds(source, copy, copy_past_the_cache)
    return {
        "peak_rss_gb": round(peak, 2),
        "time_over_copy": round(seconds / plain, 2),
        "time_over_uncached_copy": round(seconds / uncached, 2),
        "seconds": round(seconds, 1),
        "copy_seconds": round(plain, 1),
        "gb_read": round(nbytes(source) / 1e9, 2),
    }


def check_same_weights(one: Path, other: Path) -> None:
    """Compare all weight files of two folders byte by byte.

    Raises:
        AssertionError: They differ.
    """
    names = sorted(file.name for file in one.glob("*.safetensors*"))
    assert names == sorted(file.name for file in other.glob("*.safetensors*"))
    assert all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def _in_words(result: dict[str, Any]) -> str:
    return (
        f"{result['source']} to {result['target']}: {result['gb_read']} GB in {result['seconds']} s, "
        f"{result['time_over_copy']} x a copy, {result['time_over_uncached_copy']} x an uncached copy, "
        f"{result['peak_rss_gb']} GB resident"
    )


if __name__ == "__main__":
    main()
