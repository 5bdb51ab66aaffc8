"""Weights that wait in host memory."""

import torch

from benchmarks.gpu import models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Outcome, check
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import collect_hidden
from nemo_minitron.megatron.offload import OffloadedLayers


@check(order=45, seconds=6, needs=("megatron.core", "pydantic"))
def teacher_offload(bench: Bench) -> Outcome:
    """A teacher whose layers wait in host memory computes the same, and its memory is free meanwhile."""
    here = models.start()
    spec = models.small(bench)
    chunks = build_chunks(spec, here, models.precision(bench), trainable=False, seed=1)
    text = models.batches(spec.vocab_size, samples=4, length=64)
    expected = collect_hidden(chunks, text, here)
    held = torch.cuda.memory_allocated() if bench.on_gpu else 0
    layers = sum(p.numel() * p.element_size() for p in chunks[0].decoder.layers.parameters())
    offloaded = OffloadedLayers(chunks, here.device)
    freed = held - torch.cuda.memory_allocated() if bench.on_gpu else layers
    weights = list(chunks[0].decoder.layers.parameters())
    waiting = all(not weight.is_cuda for weight in weights)
    pinned = not bench.on_gpu or all(weight.is_pinned() for weight in weights)
    with torch.inference_mode(), offloaded.on_device():
        found = collect_hidden(chunks, text, here)
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ok = same and waiting and pinned and freed >= 0.95 * layers
    figure = f"equal: {same}; in pinned memory: {pinned}; {freed / 1e6:.1f} of {layers / 1e6:.1f} MB freed"
    return Outcome(figure=figure, ok=ok, figures={"freed": freed, "layers": layers})
