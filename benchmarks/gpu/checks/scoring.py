"""Importance scores: the card's against the CPU's, and what collecting them costs."""

import os
import subprocess
import sys
from contextlib import nullcontext

import torch

from benchmarks.gpu import models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Kind, Outcome, Target, check
from benchmarks.gpu.runner import ROOT
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import collect_hidden
from nemo_minitron.megatron.hooks import ImportanceCollector

NEEDS = ("megatron.core", "pydantic")
_LIMIT = 1e-3


@check(order=43, seconds=25, limit=90, needs=NEEDS)
def scores_right(bench: Bench) -> Outcome:
    """All width and depth scores in fp32, against those of the CPU."""
    return _against_cpu(bench, "dense")


@check(order=44, seconds=25, limit=90, needs=NEEDS)
def scores_right_experts(bench: Bench) -> Outcome:
    """Scores of experts, of their neurons and of the rest, in fp32, against those of the CPU."""
    return _against_cpu(bench, "experts")


@check(order=46, seconds=25, limit=90, needs=NEEDS)
def scores_right_hybrid(bench: Bench) -> Outcome:
    """Scores of Mamba's heads and channels and of the rest, in fp32, against those of the CPU."""
    return _against_cpu(bench, "hybrid")


def _against_cpu(bench: Bench, kind: str) -> Outcome:
    from benchmarks.gpu import scores

    spec = models.small(bench, kind)
    found = scores.collect(spec)
    if bench.tiny:
        expected = scores.collect(spec)
    else:
        path = bench.folder() / "cpu.safetensors"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.scores", str(path), kind],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            check=True,
            timeout=80,
            capture_output=True,
        )
        expected = scores.read(path)
    errors = {name: _relative(found[name], value) for name, value in expected.items()}
    name = max(errors, key=lambda each: errors[each])
    ok = errors[name] <= _LIMIT and found.keys() == expected.keys()
    return Outcome(figure=f"{len(errors)} sums, apart by at most {errors[name]:.1e} ({name})", ok=ok, figures=errors)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@check(order=80, seconds=25, kind=Kind.SPEED, needs=NEEDS)
def scoring_over_forward(bench: Bench) -> Outcome:
    """What all scores together cost, in forward passes."""
    here = models.start()
    spec = models.TINY if bench.tiny else models.llama(layers=8, hidden=4096, ffn=14336, heads=32)
    chunks = build_chunks(spec, here, models.precision(bench), trainable=False)
    models.fill(chunks)
    text = models.batches(spec.vocab_size, samples=2, length=64 if bench.tiny else 4096, masked=False)
    collector = ImportanceCollector(chunks, here, spec)

    def once(scoring: bool) -> None:
        with collector if scoring else nullcontext(), torch.no_grad():
            if scoring:
                collector.expect([batch.keep for batch in text])
            collect_hidden(chunks, text, here)

    plain, scoring = bench.seconds(lambda: once(False)), bench.seconds(lambda: once(True))
    kernels = bench.kernels(lambda: once(True))
    figures = {"forward_s": plain, "scoring_s": scoring, "ratio": scoring / plain, "kernels": kernels.times}
    figure = f"{plain * 1e3:.0f} ms without, {scoring * 1e3:.0f} ms with: {scoring / plain:.2f}"
    ratio = scoring / plain
    target = Target(name="scoring over forward", wanted="at most 1.3", found=ratio, met=ratio <= 1.3)
    return Outcome(figure=figure, figures=figures, targets=() if bench.tiny else (target,))
