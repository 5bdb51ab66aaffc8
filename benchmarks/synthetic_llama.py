"""Write a synthetic Llama-3.1-8B, or its first layers, as Hugging Face safetensors: real shapes, random weights.

    python -m benchmarks.synthetic_llama DIR --layers 32

16.06 GB in bf16 at 32 layers, in shards of 5 GB. Every tensor is a stretch of one block of normal numbers (seed 1234,
std 0.02), begun elsewhere each time: quick to make, and no two tensors are alike.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec, RopeScaling
from nemo_minitron.arch.weights import weight_named, weights
from nemo_minitron.checkpoints.hf import write_hf

_BLOCK = 1 << 24
_STEP = 7_368_787  # a prime, so that every tensor begins at another place of the block


def llama_8b(layers: int = 32) -> ModelSpec:
    """Llama-3.1-8B, cut to its first `layers`."""
    layer = transformer_layer(num_attention_heads=32, num_query_groups=8, ffn_hidden_size=14336)
    return ModelSpec(
        vocab_size=128256,
        hidden_size=4096,
        head_dim=128,
        layers=(layer,) * layers,
        max_position_embeddings=131072,
        rotary_base=500000.0,
        rope_scaling=RopeScaling(factor=8.0),
    )


class SyntheticSource:
    """Numbers in the shapes of a model, made when they are asked for."""

    dtype = torch.bfloat16
    family = "llama"
    lineage: dict[str, Any] = {"base_model": "synthetic", "license": None, "format": "synthetic"}  # noqa: RUF012

    def __init__(self, spec: ModelSpec, seed: int = 1234) -> None:
        self.spec = spec
        normal = torch.empty(_BLOCK).normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        self._block = normal.to(self.dtype)

    def names(self) -> tuple[str, ...]:
        """Canonical names in table order."""
        return tuple(weight.name for weight in weights(self.spec))

    def get(self, name: str) -> Tensor:
        """One tensor; norm weights lie around 1."""
        weight = weight_named(self.spec, name)
        start = self.names().index(name) * _STEP % _BLOCK
        flat = torch.empty(weight.numel, dtype=self.dtype)
        for at in range(0, weight.numel, _BLOCK):
            piece = flat[at : at + _BLOCK]
            first = min(len(piece), _BLOCK - start)
            piece[:first] = self._block[start : start + first]
            piece[first:] = self._block[: len(piece) - first]
        return flat.reshape(weight.shape) if len(weight.shape) > 1 else flat + 1

    def tokenizer_files(self) -> dict[str, bytes]:
        """None."""
        return {}


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    write_hf(SyntheticSource(llama_8b(args.layers)), args.folder)
    total = sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
    print(f"{args.folder}: {args.layers} layers, {total / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
