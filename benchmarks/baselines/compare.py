"""Ours against the plain ways: the demo's pruned student, equal tokens in equal order, one machine, one table.

    python -m benchmarks.baselines.compare --work DIR --tokens 30720 --seeds 1234 1 2 --trainers ours plain trl modelopt

For each seed a run of the demo's recipe is made as far as its pruned student; teacher, student and samples are written
for the others (`plain_kd`), and then one trainer after the other has the machine for itself. All are validated on the
same held-out windows by the same formula, ours on the way by its own validation and at the end on its export; loading
and validating are not timed. All compute in fp32: a plain loop on weights of 16 bits would lose updates that ours
keeps. A trainer's library that is not installed can lie in a folder of its own (`pip install --no-deps --target EXTRA
trl nvidia-modelopt pulp`, then `--extra EXTRA`). What is there already is not done again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.baselines.lessons import SAMPLES, STUDENT, TEACHER, divergence
from nemo_minitron.json_lines import read_rows
from nemo_minitron.megatron.data import WindowDataset, training_dataset
from nemo_minitron.stages.files import read_json, write_json

RECIPE = "smollm2/demo"
TRAINERS = ("ours", "plain", "trl", "modelopt")
Point = dict[str, float]


def call(*words: object, extra: Path | None = None) -> None:
    """A command in this Python; its failure is ours."""
    paths = [os.environ.get("PYTHONPATH", ""), *([] if extra is None else [str(extra)])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (os.getcwd(), *paths) if path)}
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True, env=environment)


class Comparison:
    """One seed of it, in a folder of its own."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.folder: Path = args.work / f"seed-{seed}"
        self.run = self.folder / "run"
        self.steps: int = args.tokens // (args.length * args.batch)

    def prepare(self) -> None:
        """Teacher, pruned student and samples for those who know Hugging Face folders."""
        self._ours(last="prune")
        for name, stage in ((TEACHER, "import/teacher"), (STUDENT, "prune/student")):
            self._convert(self.run / "stages" / stage, self.folder / name)
        data, count = self.run / "stages/data", self.steps * self.args.batch
        path = self.folder / SAMPLES
        if not path.exists():
            train = training_dataset(data, self.args.length, count, seed=self.seed)
            heldout = WindowDataset(data, "heldout", self.args.length, self.args.validation_samples, spread=True)
            splits = {
                "train": [train[index] for index in range(count)],
                "heldout": [*map(heldout.__getitem__, range(len(heldout)))],
            }
            save_file({name: torch.stack([_joined(row) for row in rows]) for name, rows in splits.items()}, path)

    def result(self, trainer: str) -> list[Point]:
        """The curve of one trainer: `tokens`, `seconds`, `kl`, `ce`."""
        path = self.folder / f"{trainer}.json"
        if not path.exists():
            print(f"{trainer}, seed {self.seed}", flush=True)
            if trainer == "ours":
                write_json(path, {"trainer": trainer, "curve": self._our_curve()})
            else:
                self._theirs(trainer, path)
        curve: list[Point] = read_json(path)["curve"]
        return curve

    def _ours(self, *, last: str) -> None:
        args = self.args
        overrides = (
            *(
                f"seed={self.seed}",
                "precision=fp32",
                "distill.minutes=null",
                f"distill.tokens={args.tokens}",
            ),
            *(f"distill.kd_weight={args.kd_weight}", f"distill.lm_weight={args.lm_weight}", "distill.log_every=1"),
            *(f"distill.optimizer.lr={args.our_lr or args.lr}", f"distill.freeze_embeddings={args.freeze_embeddings}"),
            *(f"distill.batch.sequence_length={args.length}", f"distill.batch.global_batch_size={args.batch}"),
            *("distill.validate_every=0.125", f"distill.validation_samples={args.validation_samples}"),
            *("distill.checkpoint_every=0", *args.overrides),
        )
        call("nemo_minitron", "run", args.recipe, *overrides, "--run-dir", self.run, "--to", last)

    def _our_curve(self) -> list[Point]:
        """From the run's metrics; its end is measured again on the export, by the formula that measures the others."""
        self._ours(last="distill")
        rows = read_rows(self.run / "stages/distill/metrics.jsonl")
        curve, seconds, before = [], 0.0, 0
        for row in rows:
            if "train/tokens_per_second" in row:
                seconds += (row["tokens"] - before) / row["train/tokens_per_second"]
                before = row["tokens"]
            if "val/kl" in row:
                point = {
                    "tokens": row["tokens"],
                    "seconds": round(seconds, 3),
                    "kl": row["val/kl"],
                    "ce": row["val/ce"],
                }
                curve.append(point)
        self._convert(self.run / "stages/distill/student", self.folder / "ours_hf")
        teacher, student = (
            AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)
            for name in (TEACHER, "ours_hf")
        )
        kl, ce = divergence(student.eval(), teacher.eval(), load_file(self.folder / SAMPLES)["heldout"].long())
        print(f"  ours: KL {curve[-1]['kl']:.4f} as logged, {kl:.4f} of the export", flush=True)
        return [*curve[:-1], curve[-1] | {"kl": kl, "ce": ce}]

    def _theirs(self, trainer: str, out: Path) -> None:
        args = self.args
        weights = ("--kd-weight", args.kd_weight, "--lm-weight", args.lm_weight) if trainer == "plain" else ()
        frozen = ("--freeze-embeddings",) if args.freeze_embeddings else ()
        call(
            *("benchmarks.baselines.plain_kd", "--folder", self.folder, "--trainer", trainer, "--out", out, *frozen),
            *("--steps", self.steps, "--batch", args.batch, "--lr", args.lr, "--seed", self.seed, *weights),
            *(("--threads", args.threads) if args.threads else ()),
            extra=args.extra,
        )

    def _convert(self, source: Path, target: Path) -> None:
        if not target.exists():
            call("nemo_minitron", "convert", source, target, "--to", "hf")


def _joined(row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Inputs and the last label: `[sequence_length + 1]`."""
    return torch.cat([row["tokens"], row["labels"][-1:]]).to(torch.int32)


def seconds_to(curve: Sequence[Point], kl: float) -> float | None:
    """When a curve first reached a KL, between its points by a straight line; None if it never did."""
    for earlier, later in pairwise(curve):
        if later["kl"] <= kl:
            part = (earlier["kl"] - kl) / (earlier["kl"] - later["kl"]) if earlier["kl"] > kl else 0.0
            return earlier["seconds"] + part * (later["seconds"] - earlier["seconds"])
    return None


def table(curves: dict[str, list[list[Point]]]) -> str:
    """A row a trainer: means over seeds, and in brackets the lowest and the highest."""
    lines = [
        "| trainer | seeds | KL before | KL after | CE after | seconds | tokens/s | seconds to plain's KL, of its |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in curves.items():
        ends = [run[-1] for run in runs]
        reached = []
        for run, plain in zip(runs, curves.get("plain", []), strict=False):
            found = seconds_to(run, plain[-1]["kl"])
            reached.append(None if found is None else found / plain[-1]["seconds"])
        arrived = [value for value in reached if value is not None]
        share = spread(arrived, 2) if arrived else "never"
        share += f" ({len(reached) - len(arrived)} never)" if arrived and len(arrived) < len(reached) else ""
        cells = (
            *(name, str(len(runs)), spread([run[0]["kl"] for run in runs], 4), spread([end["kl"] for end in ends], 4)),
            *(spread([end["ce"] for end in ends], 4), spread([end["seconds"] for end in ends], 1)),
            *(spread([end["tokens"] / end["seconds"] for end in ends], 0), share if "plain" in curves else ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the range of several."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["ours", "plain"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234])
    parser.add_argument("--tokens", type=int, default=30720)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=1, help="samples of a step")
    parser.add_argument("--validation-samples", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--our-lr", type=float, help="ours, if it is to differ")
    parser.add_argument("--kd-weight", type=float, default=1.0)
    parser.add_argument("--lm-weight", type=float, default=0.0)
    parser.add_argument("--freeze-embeddings", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch in the others; OMP_NUM_THREADS holds for all")
    parser.add_argument("--extra", type=Path, help="where libraries of other trainers lie")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="on top of the recipe")
    args = parser.parse_args()
    curves: dict[str, list[list[Point]]] = {name: [] for name in args.trainers}
    for seed in args.seeds:
        one = Comparison(args, seed)
        one.folder.mkdir(parents=True, exist_ok=True)
        one.prepare()
        for name in args.trainers:
            curves[name].append(one.result(name))
    text = table(curves)
    (args.work / "table.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    print(f"\nlearning rate {args.lr:g}, ours {args.our_lr or args.lr:g}; fp32\n\n{text}")


if __name__ == "__main__":
    main()
