"""GGUF files of Llama-shaped models, dequantised tensor by tensor from a memory map.

llama.cpp stores the query and key rows of the Llama family in the order of its own rotary kernel; they are put back.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.arch.families import family_named
from nemo_minitron.arch.weights import LAYER_PREFIX, Weight, part_shapes, weight_named, weights
from nemo_minitron.checkpoints.gguf_file import GgufFile
from nemo_minitron.checkpoints.gguf_spec import FACTORS, FAMILIES, read_spec
from nemo_minitron.checkpoints.gguf_tokenizer import convert_tokenizer
from nemo_minitron.checkpoints.parts import fuse
from nemo_minitron.checkpoints.plain_data import spec_of
from nemo_minitron.checkpoints.source import Checkpoint, check_tokenizer_fits
from nemo_minitron.errors import CheckpointError

_PERMUTED_FAMILIES = ("llama",)
_QUANTISATION_SUFFIX = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)(-\d{5}-of-\d{5})?$", re.IGNORECASE)

# Canonical row name to the names of its parts, in packing order.
_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("token_embd.weight",),
    LAYER_PREFIX + "self_attention.linear_qkv.layer_norm_weight": ("blk.{i}.attn_norm.weight",),
    LAYER_PREFIX + "self_attention.linear_qkv.weight": tuple(f"blk.{{i}}.attn_{part}.weight" for part in "qkv"),
    LAYER_PREFIX + "self_attention.linear_qkv.bias": tuple(f"blk.{{i}}.attn_{part}.bias" for part in "qkv"),
    LAYER_PREFIX + "self_attention.q_layernorm.weight": ("blk.{i}.attn_q_norm.weight",),
    LAYER_PREFIX + "self_attention.k_layernorm.weight": ("blk.{i}.attn_k_norm.weight",),
    LAYER_PREFIX + "self_attention.linear_proj.weight": ("blk.{i}.attn_output.weight",),
    LAYER_PREFIX + "mlp.linear_fc1.layer_norm_weight": ("blk.{i}.ffn_norm.weight",),
    LAYER_PREFIX + "mlp.linear_fc1.weight": ("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight"),
    LAYER_PREFIX + "mlp.linear_fc2.weight": ("blk.{i}.ffn_down.weight",),
    "decoder.final_layernorm.weight": ("output_norm.weight",),
    "output_layer.weight": ("output.weight",),
}
_READ_KEYS = ("general.", "split.", "tokenizer.", "quantize.")


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or the first part of a split one; its tensors come as fp32.

    Raises:
        CheckpointError: The file is damaged, a part or key is missing, or a weight is missing, unknown or of the wrong
            shape.
        SpecError: The architecture is not supported.
    """
    reader = _Reader(path)
    return Checkpoint(
        spec=reader.spec,
        family=reader.family,
        dtype=torch.float32,
        lineage=reader.lineage(),
        format="GGUF",
        layout=reader.layout(),
        files=reader.tokenizer_files,
        get=reader.get,
        notes=reader.notes,
    )


class _Reader:
    """What the file or folder holds, checked; see `open_gguf`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self.spec = spec_of(lambda: read_spec(self._file), {}, where=str(path))
        self.family = FAMILIES[self._file.field("general.architecture", None)]
        self._check_names()
        self._tokenizer_files: dict[str, bytes] | None = None

    def lineage(self) -> dict[str, Any]:
        """Name, licence and quantisation that the file states."""
        organisation = self._file.field("general.organization", "")
        name = _QUANTISATION_SUFFIX.sub("", self.path.stem)
        kinds = sorted({tensor.tensor_type.name for tensor in self._file.tensors.values()})
        return {
            "base_model": f"{organisation}/{name}" if organisation else name,
            "license": self._file.field("general.license", None),
            "format": "gguf",
            "file": self.path.name,
            "quantisation": kinds,
        }

    def layout(self) -> str:
        """How the weights are stored."""
        parts = len(self._file.parts)
        return f"{', '.join(self.lineage()['quantisation'])}" + (f" ({parts} parts)" if parts > 1 else "")

    def notes(self) -> tuple[str, ...]:
        """What of the metadata goes nowhere."""
        prefix = f"{self._file.field('general.architecture', '')}."
        left = sorted(key for key in self._file.names() if not key.startswith((*_READ_KEYS, prefix)))
        return (f"keys that are not carried on: {', '.join(left)}",) if left else ()

    def get(self, name: str) -> Tensor:
        """One canonical tensor, dequantised."""
        weight = weight_named(self.spec, name)
        return fuse([self._part(part) for part in self._part_names(weight)], weight, self.spec)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Hugging Face tokenizer files, built from the metadata, and generation defaults.

        Raises:
            CheckpointError: The file has no tokenizer, one that cannot be converted, or one that does not fit.
        """
        if self._tokenizer_files is None:
            files = convert_tokenizer(self.path, self._file.field)
            check_tokenizer_fits(files, self.spec, where=str(self.path))
            self._tokenizer_files = files
        return self._tokenizer_files

    def _part(self, name: str) -> Tensor:
        values = self._file.tensor(name)
        kind = name.rpartition(".")[0].rpartition("_")[2]
        if self.family in _PERMUTED_FAMILIES and kind in ("q", "k") and ".attn_" in name:
            return _rotary_rows_as_halves(values, head_dim=self.spec.head_dim)
        return values

    def _part_names(self, weight: Weight) -> tuple[str, ...]:
        return tuple(name.format(i=weight.layer) for name in _NAMES[weight.row.name])

    def _check_names(self) -> None:
        tensors = self._file.tensors
        objections = family_named(self.family).objections(self.spec)
        if objections:
            raise CheckpointError(
                f"{self.path}: {', '.join(objections)} by its tensors",
                rule=f"what a model of general.architecture = {self.family} has",
            )
        expected: dict[str, tuple[int, ...]] = {}
        for weight in weights(self.spec):
            expected |= dict(zip(self._part_names(weight), part_shapes(weight, self.spec), strict=True))
        if missing := sorted(set(expected) - set(tensors)):
            raise CheckpointError(
                f"{self.path}: {len(missing)} weight(s) missing, {missing[0]} first",
                rule=f"every weight that the metadata implies is there (block_count = {self.spec.num_layers})",
            )
        if extra := sorted(set(tensors) - set(expected) - {FACTORS}):
            raise CheckpointError(
                f"{self.path}: {len(extra)} weight(s) unknown, {extra[0]} first",
                rule=f"no weight is left out in silence (block_count = {self.spec.num_layers})",
            )
        for name, shape in expected.items():
            stored = tuple(int(size) for size in reversed(tensors[name].shape))
            if stored != shape:
                raise CheckpointError(
                    f"{self.path}: {name} is shaped {stored}",
                    rule=f"the metadata implies {shape} (embedding_length, feed_forward_length, attention.head_count, "
                    "attention.head_count_kv, attention.key_length)",
                )


def _rotary_rows_as_halves(rows: Tensor, *, head_dim: int) -> Tensor:
    """Rows (x0 y0 x1 y1 ...) of each head back to (x0 x1 ... y0 y1 ...), the order of Hugging Face and Megatron."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()
