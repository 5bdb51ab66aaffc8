"""Layers from Transformer Engine against our own."""

from unittest.mock import patch

import torch

from benchmarks.gpu import dense, models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Outcome, UnavailableError, check
from nemo_minitron.megatron import sharded_io
from nemo_minitron.megatron.build import build_chunks, engine_carries
from nemo_minitron.megatron.forward import collect_logits

NEEDS = ("megatron.core", "pydantic", "transformer_engine")


@check(order=13, seconds=15, limit=60, needs=NEEDS)
def engine_layers(bench: Bench) -> Outcome:
    """Transformer Engine's layers give our layers' logits, and take up a native checkpoint of theirs."""
    here, spec = models.start(), models.small(bench)
    if not engine_carries(spec, here.device):
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
        ours = build_chunks(spec, here, models.precision(bench), trainable=False, seed=1)
    error = max(dense.relative_error(a, b) for a, b in zip(collect_logits(ours, text, here), expected, strict=True))
    figure = f"ours apart by {error:.1e}; restored equal: {same}"
    return Outcome(figure=figure, ok=same and error < 3e-2, figures={"apart": error})
