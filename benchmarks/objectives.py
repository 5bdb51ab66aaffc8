"""What a student is best taught with: the demo's teacher and student, equal tokens, one objective after the other.

    python -m benchmarks.objectives --work DIR --tokens 51200 --precision fp32

Every variant is an ordinary run of `recipes/smollm2/demo.yaml` with the overrides that its row names, in a folder of
its own below DIR; what they share (teacher, texts, scores, pruned student) is made once and copied. The figures are
perplexities on held-out Wikipedia, and the forward KL to the teacher on the samples of a validation (none where no
teacher is in memory). A run of DIR that was cut off goes on where it was.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weight_named
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource, names_of

RECIPE = "recipes/smollm2/demo.yaml"


@dataclass(frozen=True)
class Variant:
    """A row of the table: its name, and what it puts on top of the recipe."""

    name: str
    overrides: tuple[str, ...]
    shares_pruned: bool = True
    random: bool = False


def weights_of(kd: float, lm: float) -> tuple[str, ...]:
    return f"distill.kd_weight={kd:g}", f"distill.lm_weight={lm:g}"


VARIANTS = (
    Variant("forward KL", weights_of(1, 0)),
    Variant("reverse KL", (*weights_of(1, 0), "distill.divergence=reverse_kl")),
    Variant("forward KL + CE", weights_of(0.5, 0.5)),
    Variant("CE alone", weights_of(0, 1)),
    Variant("forward KL + hidden states", (*weights_of(1, 0), "distill.hidden.layers=[[-3,-3]]")),
    Variant("forward KL, 50 cached draws", (*weights_of(1, 0), "cache.kind=sampled")),
    Variant("forward KL, corrected teacher", (*weights_of(1, 0), "correct.tokens={tokens}"), shares_pruned=False),
    Variant("forward KL, all weights", (*weights_of(1, 0), "distill.freeze_embeddings=false")),
    Variant(
        "forward KL, all weights, from random ones", (*weights_of(1, 0), "distill.freeze_embeddings=false"), random=True
    ),
)


class RandomSource:
    """A checkpoint of the same architecture with normal weights of deviation 0.02, and norms of one."""

    def __init__(self, like: TensorSource, seed: int) -> None:
        self._like = like
        self._generator = torch.Generator().manual_seed(seed)
        self.family = like.family
        self.lineage = {**like.lineage, "random": seed}

    @property
    def spec(self) -> ModelSpec:
        """The other's."""
        return self._like.spec

    @property
    def dtype(self) -> torch.dtype:
        """The other's."""
        return self._like.dtype

    def names(self) -> tuple[str, ...]:
        """In table order."""
        return names_of(self.spec)

    def get(self, name: str) -> torch.Tensor:
        """Drawn when asked for; ask in order."""
        shape = weight_named(self.spec, name).shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype)
        return torch.randn(shape, generator=self._generator).mul_(0.02).to(self.dtype)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The other's."""
        return self._like.tokenizer_files()


def run(folder: Path, overrides: tuple[str, ...], *, last: str) -> None:
    """One command; a finished stage is skipped."""
    words = [sys.executable, "-m", "nemo_minitron", "run", RECIPE, *overrides, "--run-dir", str(folder), "--to", last]
    subprocess.run(words, check=True)


def result(variant: Variant, work: Path, common: tuple[str, ...], tokens: int) -> dict[str, float]:
    """Perplexities of one variant, and the KL to its teacher."""
    folder = work / variant.name.replace(" ", "_").replace(",", "").replace("+", "and")
    overrides = (*common, *(word.format(tokens=tokens) for word in variant.overrides))
    if not folder.exists() and variant.shares_pruned:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(work / "shared", partial)
        if variant.random:
            student = partial / "stages/prune/student"
            write_folder(RandomSource(open_checkpoint(student), seed=1234), student)
        partial.rename(folder)
    run(folder, overrides, last="evaluate")
    validation = json.loads((folder / "stages/distill/result.json").read_text())["validation"]
    perplexity = json.loads((folder / "stages/evaluate/evaluation.json").read_text())["perplexity"]
    return {**perplexity, "kl": validation.get("kl", math.nan)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=51200)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    common = (
        f"distill.tokens={args.tokens}",
        "distill.validate_every=0",
        "evaluate.max_tokens=10240",
        f"seed={args.seed}",
        f"precision={args.precision}",
    )
    run(args.work / "shared", common, last="prune")
    title = f"{args.tokens:,} tokens, seed {args.seed}, {args.precision}"
    print(f"\n| {title} | teacher | pruned | distilled | KL |\n| --- | ---: | ---: | ---: | ---: |")
    for variant in VARIANTS:
        found = result(variant, args.work, common, args.tokens)
        perplexities = " | ".join(f"{found[model]:.2f}" for model in ("teacher", "pruned", "distilled"))
        print(f"| {variant.name} | {perplexities} | {found['kl']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
