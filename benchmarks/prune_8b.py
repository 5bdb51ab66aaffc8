"""Prune a synthetic Llama-3.1-8B to the Minitron 4B width shape, against copying the same bytes with the same disk.

    python -m benchmarks.prune_8b --json --work DIR

One line per source ("hf": safetensors; "torch_dist": a checkpoint folder), student as Hugging Face safetensors:
`peak_rss_gb`, `time_over_copy` (against `shutil.copyfile` of the source's files), `time_over_uncached_copy` (against a
copy that passes by the page cache as our readers and writers do), `source`, and what they were taken from. Needs 33 GB
of disk in DIR, which is left as it was. `--layers 4` is the same with an eighth of the layers.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.copying import copy_past_the_cache, copy_seconds, job_seconds, nbytes
from benchmarks.synthetic_llama import SyntheticSource, llama_8b
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan

TARGET = TargetConfig(hidden_size=3072, ffn_hidden_size=9216)
"""Minitron 4B: all 32 layers, 32 heads of 128 in 8 groups. Which units stay is drawn by lot (seed 0): scattered indices
are the slow case."""


def main() -> None:
    """Measure, or with `--job` be the process that is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder to work in; a new one is made inside and removed")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="copies and jobs take turns; medians are printed")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--job", nargs=2, type=Path, metavar=("SOURCE", "STUDENT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        prune(*args.job)
        return
    with tempfile.TemporaryDirectory(dir=args.work, prefix="prune_8b_") as name:
        work = Path(name)
        for source in ("hf", "torch_dist"):
            write = write_hf if source == "hf" else write_folder
            write(SyntheticSource(llama_8b(args.layers)), work / "teacher")
            result = contest(work, args.rounds, layers=args.layers) | {"source": source}
            print(json.dumps(result) if args.json else _in_words(result), flush=True)
            shutil.rmtree(work / "teacher")


def prune(source: Path, student: Path) -> None:
    """The job: a checkpoint in, a pruned Hugging Face folder out."""
    teacher = open_checkpoint(source)
    write_hf(PrunedSource(teacher, random_plan(TARGET, teacher.spec, seed=0)), student)


def contest(work: Path, rounds: int, *, layers: int) -> dict[str, Any]:
    """Prune `work/teacher` and copy it, in turns."""
    copies, uncached, jobs, peaks = [], [], [], []
    for _ in range(rounds):
        copies.append(copy_seconds(work / "teacher", work / "copy"))
        seconds, peak = job_seconds(
            ["benchmarks.prune_8b", "--job", str(work / "teacher"), str(work / "student")], work / "teacher"
        )
        jobs.append(seconds)
        peaks.append(peak)
        parameters = check_student(work / "student", layers)
        shutil.rmtree(work / "student")
        uncached.append(copy_seconds(work / "teacher", work / "copy", copy_past_the_cache))
    job, copy = statistics.median(jobs), statistics.median(copies)
    return {
        "peak_rss_gb": round(max(peaks), 2),
        "time_over_copy": round(job / copy, 2),
        "time_over_uncached_copy": round(job / statistics.median(uncached), 2),
        "seconds": round(job, 1),
        "copy_seconds": round(copy, 1),
        "gb_read": round(nbytes(work / "teacher") / 1e9, 2),
        "student_parameters": parameters,
    }


def check_student(folder: Path, layers: int) -> int:
    """Compare what was written with what transformers builds from its `config.json`; returns the parameter count.

    Names and shapes only: the model is built on the meta device, and the files' headers are read.

    Raises:
        AssertionError: They differ, or the parameter count is not the arithmetic one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_minitron.checkpoints.safetensors_file import SafetensorsFile

    config = AutoConfig.from_pretrained(folder)
    assert config.head_dim == 128
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = [SafetensorsFile(path) for path in sorted(folder.glob("*.safetensors"))]
    stored = {name: entry.shape for file in files for name, entry in file.entries.items()}
    assert stored == expected
    hidden, ffn, heads, groups, width, vocabulary = 3072, 9216, 32, 8, 128, 128256
    a_layer = hidden * (2 * heads + 2 * groups) * width + 3 * hidden * ffn + 2 * hidden
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameter_count(open_checkpoint(folder).spec) == layers * a_layer + (2 * vocabulary + 1) * hidden
    return count


def _in_words(result: dict[str, Any]) -> str:
    return (
        f"{result['source']}: {result['gb_read']} GB in {result['seconds']} s, {result['time_over_copy']} x a copy, "
        f"{result['time_over_uncached_copy']} x an uncached copy, {result['peak_rss_gb']} GB resident"
    )


if __name__ == "__main__":
    main()
