"""The scores of a small model over a fixed text; as a program, those of the CPU, written to a file.

`python -m benchmarks.gpu.scores FILE KIND` with CUDA_VISIBLE_DEVICES empty: Megatron uses a GPU wherever it sees one.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gpu import models
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import Precision
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import collect_hidden
from nemo_minitron.megatron.hooks import ImportanceCollector


def collect(spec: ModelSpec) -> dict[str, Tensor]:
    """All sums in fp32, of weights and text that are the same on every device."""
    here = models.start()
    chunks = build_chunks(spec, here, Precision.FP32, trainable=False, seed=1)
    text = models.batches(spec.vocab_size, samples=8, length=128)
    with ImportanceCollector(chunks, here, spec) as collector, torch.inference_mode():
        collector.expect([batch.keep for batch in text])
        collect_hidden(chunks, text, here)
    return collector.result()


def read(path: Path) -> dict[str, Tensor]:
    """What the program wrote."""
    return load_file(path)


if __name__ == "__main__":
    found = collect(models.KINDS[sys.argv[2]][0])
    save_file({name: value.contiguous() for name, value in found.items()}, sys.argv[1])
