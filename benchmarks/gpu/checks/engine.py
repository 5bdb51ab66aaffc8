"""Layers from Transformer Engine against our own."""

from unittest.mock import patch

import torch

from benchmarks.gpu import dense, models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Kind, Outcome, Target, UnavailableError, check
from nemo_minitron.megatron import sharded_io
from nemo_minitron.megatron.build import build_chunks, engine_carries
from nemo_minitron.megatron.forward import collect_hidden, collect_logits

NEEDS = ("megatron.core", "pydantic", "transformer_engine")

FP8_APART = 0.25
"""Eight such layers in plain torch, both factors of every product scaled by their largest and rounded to E4M3, end up
0.17 to 0.18 apart, at hidden sizes 1024 and 2048. A trained model's fp8 does better."""


@check(order=13, seconds=15, limit=60, needs=NEEDS)
def engine_layers(bench: Bench) -> Outcome:
    """Transformer Engine's layers give our layers' logits, and take up a native checkpoint of theirs."""
    return _against_ours(bench, "dense")


@check(order=17, seconds=15, limit=60, needs=NEEDS)
def engine_experts(bench: Bench) -> Outcome:
    """Grouped products of experts give the logits of one expert after the other; a native checkpoint comes back."""
    return _against_ours(bench, "experts")


@check(order=18, seconds=15, limit=60, needs=NEEDS)
def engine_hybrid(bench: Bench) -> Outcome:
    """Mamba between Transformer Engine's linears gives our layers' logits; a native checkpoint comes back."""
    return _against_ours(bench, "hybrid")


def _against_ours(bench: Bench, kind: str) -> Outcome:
    here, spec = models.start(), models.small(bench, kind)
    if not engine_carries(spec, here.device, models.precision(bench)):
        raise UnavailableError("Transformer Engine is installed, but its layers are not used here")
    text = models.batches(spec.vocab_size, samples=4, length=128)
    theirs = build_chunks(spec, here, models.precision(bench), trainable=False, seed=1)
    expected = collect_logits(theirs, text, here)
    folder = bench.folder()
    sharded_io.save_weights(theirs, folder)
    restored = build_chunks(spec, here, models.precision(bench), trainable=False)
    sharded_io.load_weights(restored, folder)
    same = all(torch.equal(a, b) for a, b in zip(collect_logits(restored, text, here), expected, strict=True))
    with patch("nemo_minitron.megatron.build.engine_carries", return_value=False):
        ours = build_chunks(spec, here, models.precision(bench), trainable=False)
    sharded_io.load_weights(ours, folder)
    error = max(dense.relative_error(a, b) for a, b in zip(collect_logits(ours, text, here), expected, strict=True))
    figure = f"ours apart by {error:.1e}; restored equal: {same}"
    return Outcome(figure=figure, ok=same and error < 3e-2, figures={"apart": error})


@check(order=71, seconds=20, limit=90, kind=Kind.SPEED, needs=NEEDS)
def teacher_fp8(bench: Bench) -> Outcome:
    """A teacher's pass in fp8 against bf16: its final states, and its time."""
    here = models.start()
    spec = models.llama(layers=2 if bench.tiny else 8, hidden=4096, ffn=14336, heads=32)
    if not engine_carries(spec, here.device, models.precision(bench)):
        raise UnavailableError("Transformer Engine is installed, but its layers are not used here")
    text = models.batches(spec.vocab_size, samples=2, length=8192, masked=False)
    states, seconds = {}, {}
    for fp8 in (False, True):
        chunks = build_chunks(spec, here, models.precision(bench), trainable=False, fp8=fp8)
        torch.manual_seed(0)
        models.fill(chunks, by_width=True)
        states[fp8] = collect_hidden(chunks, text, here)
        seconds[fp8] = bench.seconds(lambda chunks=chunks: collect_hidden(chunks, text, here), rounds=3)
        del chunks
    pairs = zip(states[True], states[False], strict=True)
    error, ratio = max(dense.relative_error(a, b) for a, b in pairs), seconds[True] / seconds[False]
    figure = f"{seconds[False] * 1e3:.0f} ms in bf16, {seconds[True] * 1e3:.0f} ms in fp8; states apart by {error:.1e}"
    target = Target(name="fp8 over bf16", wanted="at most 0.8", found=ratio, met=ratio <= 0.8)
    figures = {"bf16_s": seconds[False], "fp8_s": seconds[True], "apart": error}
    return Outcome(figure=figure, ok=error < FP8_APART, figures=figures, targets=(target,))
