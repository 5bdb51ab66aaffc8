"""GGUF files of Llama-shaped models, dequantised tensor by tensor from a memory map.

llama.cpp stores the query and key rows of the Llama family in the order of its own rotary kernel; they are put back.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX, Weight, weight_named, weights
from nemo_minitron.checkpoints.gguf_tokenizer import convert_tokenizer
from nemo_minitron.checkpoints.parts import fuse, part_shapes
from nemo_minitron.checkpoints.source import check_tokenizer_fits, names_of
from nemo_minitron.errors import CheckpointError, SpecError

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_LONGEST_ROW = 1 << 13  # bytes; 16 of them and their fp32 values stay in the processor's cache
_PERMUTED_FAMILIES = ("llama",)
_QUANTISATION_SUFFIX = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)

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


class GgufSource:
    """A GGUF file as canonical fp32 tensors.

    Raises:
        CheckpointError: The file is damaged, or a weight is missing, unknown or of the wrong shape.
        SpecError: The architecture is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._spec = self._read_spec()
        self._check_names()
        self._tokenizer_files: dict[str, bytes] | None = None

    @property
    def spec(self) -> ModelSpec:
        """The architecture, from the file's metadata."""
        return self._spec

    @property
    def dtype(self) -> torch.dtype:
        """fp32: what the quantised blocks are expanded to."""
        return torch.float32

    @property
    def lineage(self) -> dict[str, Any]:
        """Name, licence and quantisation that the file states."""
        organisation = self._field("general.organization", "")
        name = _QUANTISATION_SUFFIX.sub("", self.path.stem)
        kinds = sorted({tensor.tensor_type.name for tensor in self._reader.tensors})
        return {
            "base_model": f"{organisation}/{name}" if organisation else name,
            "license": self._field("general.license", None),
            "format": "gguf",
            "file": self.path.name,
            "quantisation": kinds,
        }

    def names(self) -> tuple[str, ...]:
        """Canonical names in table order."""
        return names_of(self._spec)

    def get(self, name: str) -> Tensor:
        """One canonical tensor, dequantised."""
        weight = weight_named(self._spec, name)
        return fuse([self._part(part) for part in self._part_names(weight)], weight, self._spec)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Hugging Face tokenizer files, converted by transformers from the metadata, and generation defaults.

        Raises:
            CheckpointError: The file has no tokenizer that transformers can convert, or it does not fit.
        """
        if self._tokenizer_files is None:
            files = convert_tokenizer(self.path, self._field)
            check_tokenizer_fits(files, self._spec, where=str(self.path))
            self._tokenizer_files = files
        return dict(self._tokenizer_files)

    def _part(self, name: str) -> Tensor:
        values = _dequantised(self._tensors[name])
        kind = name.rpartition(".")[0].rpartition("_")[2]
        if self._spec.family in _PERMUTED_FAMILIES and kind in ("q", "k") and ".attn_" in name:
            return _rotary_rows_as_halves(values, head_dim=self._spec.head_dim)
        return values

    def _part_names(self, weight: Weight) -> tuple[str, ...]:
        return tuple(name.format(i=weight.layer) for name in _NAMES[weight.row.name])

    def _field(self, key: str, default: Any) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _read_spec(self) -> ModelSpec:
        architecture = self._field("general.architecture", None)
        if architecture not in _FAMILIES:
            raise SpecError(
                f"{self.path}: architecture {architecture!r} is not supported", rule=f"one of {', '.join(_FAMILIES)}"
            )

        def size(key: str) -> int:
            value = self._field(f"{architecture}.{key}", None)
            if not isinstance(value, int):
                raise CheckpointError(
                    f"{self.path}: metadata {architecture}.{key} is {value!r}", rule="one whole number"
                )
            return value

        heads = size("attention.head_count")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: token_embd.weight is missing")
        layer = LayerSpec(
            num_attention_heads=heads,
            num_query_groups=self._field(f"{architecture}.attention.head_count_kv", heads),
            ffn_hidden_size=size("feed_forward_length"),
        )
        return ModelSpec(
            family=_FAMILIES[architecture],
            vocab_size=int(embedding.shape[1]),
            hidden_size=size("embedding_length"),
            head_dim=self._field(f"{architecture}.attention.key_length", None) or size("embedding_length") // heads,
            layers=(layer,) * size("block_count"),
            max_position_embeddings=size("context_length"),
            norm_eps=_shortest(self._field(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)),
            rotary_base=_shortest(self._field(f"{architecture}.rope.freq_base", 10000.0)),
            tied_embeddings="output.weight" not in self._tensors,
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
        )

    def _check_names(self) -> None:
        if "rope_freqs.weight" in self._tensors or self._field(f"{self._arch}.rope.scaling.type", "none") != "none":
            raise SpecError(
                f"{self.path}: rotary scaling cannot be read back from a GGUF file",
                remedy="import the Hugging Face checkpoint of this model instead",
            )
        rotated = self._field(f"{self._arch}.rope.dimension_count", self._spec.head_dim)
        window = self._field(f"{self._arch}.attention.sliding_window", None)
        if rotated != self._spec.head_dim or window:
            raise SpecError(
                f"{self.path}: heads rotated in part ({rotated} channels) or a sliding window ({window})",
                rule="neither is read from GGUF files",
            )
        expected: dict[str, tuple[int, ...]] = {}
        for weight in weights(self._spec):
            expected |= dict(zip(self._part_names(weight), part_shapes(weight, self._spec), strict=True))
        missing, extra = sorted(set(expected) - set(self._tensors)), sorted(set(self._tensors) - set(expected))
        if missing or extra:
            raise CheckpointError(
                f"{self.path}: weights do not fit the metadata; missing {missing[:3]}, unknown {extra[:3]}",
                rule="every weight has a place and every place a weight",
            )
        for name, shape in expected.items():
            stored = tuple(int(size) for size in reversed(self._tensors[name].shape))
            if stored != shape:
                raise CheckpointError(f"{self.path}: {name} is shaped {stored}", rule=f"the metadata implies {shape}")

    @property
    def _arch(self) -> str:
        return str(self._field("general.architecture", ""))


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # the reader raises whatever numpy or struct do on a damaged file
        raise CheckpointError(
            f"{path}: not a sound GGUF file ({type(error).__name__}: {error})", remedy="truncated? fetch it again"
        ) from error


def _dequantised(tensor: Any) -> Tensor:
    """A tensor of the file in fp32.

    The package works on 16 rows at a time, which is too little for its overhead: it is handed fewer and longer rows
    (blocks know nothing of rows), and plain arrays, because slicing a memory map costs more than the arithmetic.
    """
    from gguf.quants import dequantize

    data = np.asarray(tensor.data).view(np.ndarray)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    rows = data.shape[0] if data.ndim > 1 else 1
    joined = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * data[0].nbytes <= _LONGEST_ROW))
    values = dequantize(data.reshape(rows // joined, -1), tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))


def _rotary_rows_as_halves(rows: Tensor, *, head_dim: int) -> Tensor:
    """Rows (x0 y0 x1 y1 ...) of each head back to (x0 x1 ... y0 y1 ...), the order of Hugging Face and Megatron."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32 number: GGUF stores 1e-5 as 9.99999974...e-06."""
    return float(str(np.float32(value)))
