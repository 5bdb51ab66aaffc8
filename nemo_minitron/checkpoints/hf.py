"""Hugging Face folders: safetensors, `config.json`, tokenizer files."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.arch.families import Family, family_named, family_of_hf_config
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import Weight, weight_named, weights
from nemo_minitron.checkpoints.files import FolderFiles, staged_folder
from nemo_minitron.checkpoints.parts import fuse_stored, split_stored, stored_shapes, widest
from nemo_minitron.checkpoints.plain_data import read_json, spec_of
from nemo_minitron.checkpoints.safetensors_file import Entry, SafetensorsFile, SafetensorsWriter
from nemo_minitron.checkpoints.source import (
    LICENCE_FILES,
    PLAN_FILE,
    TOKENIZER_FILES,
    TensorSource,
    check_tokenizer_fits,
    names_of,
    stream,
)
from nemo_minitron.checkpoints.torch_file import TorchFile
from nemo_minitron.errors import CheckpointError

SHARD_BYTES = 5_000_000_000
"""Largest weight file written; Hugging Face's own long-time default."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BIN_INDEX = "pytorch_model.bin.index.json"
_BIN = "pytorch_model.bin"
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
# Buffers that old versions of transformers saved beside the weights.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")


class HfSource:
    """A Hugging Face folder as canonical tensors: safetensors, or `pytorch_model.bin` files of before them.

    Raises:
        CheckpointError: A file is missing or damaged, a weight is missing, unknown or of the wrong shape, or
            the tokenizer does not fit the vocabulary.
        SpecError: The architecture is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = _read_json(folder / "config.json")
        if "quantization_config" in self._config:
            raise CheckpointError(
                f"{folder}: the weights are quantised (quantization_config)", rule="fp32, bf16 or fp16 weights"
            )
        self._family = family_of_hf_config(self._config)
        self._spec = spec_of(
            lambda: self._family.read_config(self._config), self._config, where=f"{folder / 'config.json'}"
        )
        self._files = _open_weight_files(folder)
        self._where = {name: file for file in self._files for name in file.entries}
        self._check_names()
        kept = sorted(name for name in self._where if not _DERIVED.search(name))
        self._dtype = widest([self._where[name].entries[name].dtype for name in kept])
        self._tokenizer_files = self._read_tokenizer_files()
        check_tokenizer_fits(self._tokenizer_files, self._spec, where=str(folder))

    @property
    def spec(self) -> ModelSpec:
        """The architecture, from `config.json`."""
        return self._spec

    @property
    def dtype(self) -> torch.dtype:
        """Type that holds every stored weight exactly."""
        return self._dtype

    @property
    def lineage(self) -> dict[str, Any]:
        """What `write_hf` recorded; for a foreign folder its name and the licence of its model card."""
        recorded = self._config.get("minitron")
        if isinstance(recorded, dict) and isinstance(recorded.get("lineage"), dict):
            return dict(recorded["lineage"])
        name = self._config.get("_name_or_path") or _name_of(self.folder)
        return {"base_model": name, "license": _licence_of_card(self.folder / "README.md"), "format": "hf"}

    @property
    def layout(self) -> str:
        """How the weights are stored."""
        kind = "safetensors" if isinstance(self._files[0], SafetensorsFile) else "files of torch.save"
        return f"{kind} ({len(self._files)} file{'s' if len(self._files) > 1 else ''})"

    def names(self) -> tuple[str, ...]:
        """Canonical names in table order."""
        return names_of(self._spec)

    def get(self, name: str) -> Tensor:
        """One canonical tensor; q, k, v and gate, up are fused."""
        weight = weight_named(self._spec, name)
        parts = [self._where[part].get(part).to(self._dtype) for part in hf_names(self._family, weight)]
        return fuse_stored(parts, weight, self._spec)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Tokenizer, generation defaults, licence and plan files found in the folder."""
        return dict(self._tokenizer_files)

    def _read_tokenizer_files(self) -> dict[str, bytes]:
        names = [name for name in (*TOKENIZER_FILES, *LICENCE_FILES, PLAN_FILE) if (self.folder / name).is_file()]
        files = {name: (self.folder / name).read_bytes() for name in names}
        special = {key: self._config[key] for key in _SPECIAL_IDS if self._config.get(key) is not None}
        if "generation_config.json" not in files and special:
            files["generation_config.json"] = _json_bytes(special)
        return files

    def _check_names(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for weight in weights(self._spec):
            names = hf_names(self._family, weight)
            expected |= dict(zip(names, stored_shapes(weight, self._spec, tensors=len(names)), strict=True))
        found = {name for name in self._where if not _DERIVED.search(name)}
        if self._spec.tied_embeddings:  # some writers store the shared matrix under both names
            found -= set(self._family.hf_names["output_layer.weight"])
        if missing := sorted(set(expected) - found):
            raise CheckpointError(
                f"{self.folder}: {len(missing)} weight(s) missing, {missing[0]} first",
                rule="every weight that config.json implies is there",
                remedy="the download may be incomplete, or config.json of another model",
            )
        if extra := sorted(found - set(expected)):
            raise CheckpointError(
                f"{self.folder}: {len(extra)} weight(s) unknown in a {self._family.name} model, {extra[0]} first",
                rule="no weight is left out in silence",
                remedy="is model_type in config.json right, and is this a plain causal language model?",
            )
        for name, shape in expected.items():
            if (stored := self._where[name].entries[name].shape) != shape:
                raise CheckpointError(f"{self.folder}: {name} is shaped {stored}", rule=f"config.json implies {shape}")


def read_architecture(path: Path) -> ModelSpec:
    """The architecture that a `config.json` describes, whether weights lie beside it or not.

    Raises:
        CheckpointError: The file cannot be read.
        SpecError: The architecture is not supported.
    """
    config = _read_json(path)
    return spec_of(lambda: family_of_hf_config(config).read_config(config), config, where=str(path))


def hf_names(family: Family, weight: Weight) -> tuple[str, ...]:
    """Hugging Face names of a weight's parts, in packing order; one name where they lie in one tensor.

    Raises:
        CheckpointError: The family has no such weight.
    """
    if weight.row.name not in family.hf_names:
        raise CheckpointError(f"{weight.name} has no Hugging Face name in family {family.name}")
    return tuple(name.format(i=weight.layer) for name in family.hf_names[weight.row.name])


def hf_config(
    spec: ModelSpec, *, dtype: torch.dtype, files: Mapping[str, bytes], lineage: dict[str, Any]
) -> dict[str, Any]:
    """`config.json` data: architecture, special token ids (from the generation defaults), type, lineage."""
    config = family_named(spec.family).write_config(spec)
    generation = json.loads(files.get("generation_config.json", b"{}"))
    config |= {key: generation[key] for key in _SPECIAL_IDS if generation.get(key) is not None}
    return config | {"torch_dtype": _DTYPE_NAMES[dtype], "minitron": {"lineage": lineage}}


def write_hf(
    source: TensorSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a Hugging Face folder: safetensors in shards, index, config, generation defaults, tokenizer files.

    Args:
        source: What to write.
        folder: Where; a folder of that name is replaced once the new one is whole.
        dtype: Type of the weights; None keeps the source's.
        shard_bytes: Largest weight file, unless one tensor alone is larger.
        extra_files: More files by name, as a model card.

    Raises:
        SpecError: The family's `config.json` cannot say this architecture (layers of different sizes).
    """
    dtype = dtype or source.dtype
    files = source.tokenizer_files()
    config = hf_config(source.spec, dtype=dtype, files=files, lineage=source.lineage)
    with staged_folder(folder) as partial:
        _write_weights(source, partial, dtype, shard_bytes)
        for name, data in (*files.items(), *(extra_files or {}).items()):
            (partial / name).write_bytes(data)
        (partial / "config.json").write_bytes(_json_bytes(config))


def _write_weights(source: TensorSource, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    family = family_named(source.spec.family)
    shards = list(_shards(source.spec, family, dtype, shard_bytes))
    single = len(shards) == 1
    file_names = [
        _SINGLE if single else f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    tensors = stream(source)
    for file_name, (shard, entries) in zip(file_names, shards, strict=True):
        with SafetensorsWriter(folder / file_name, entries, {"format": "pt"}) as writer:
            for weight in shard:
                name, tensor = next(tensors)
                if name != weight.name:
                    raise AssertionError(f"the source gave {name} in place of {weight.name}")
                part_names = hf_names(family, weight)
                parts = split_stored(tensor, weight, source.spec, tensors=len(part_names))
                for part_name, part in zip(part_names, parts, strict=True):
                    writer.write(part_name, part.to(dtype))
    if not single:
        placed = {name: file for file, (_, entries) in zip(file_names, shards, strict=True) for name in entries}
        total = sum(entry.nbytes for _, entries in shards for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / _INDEX).write_bytes(_json_bytes(index))


def _shards(
    spec: ModelSpec, family: Family, dtype: torch.dtype, limit: int
) -> Iterator[tuple[list[Weight], dict[str, Entry]]]:
    """Consecutive weights and their parts' entries, together at most `limit` bytes."""
    shard: list[Weight] = []
    entries: dict[str, Entry] = {}
    used = 0
    for weight in weights(spec):
        size = weight.numel * dtype.itemsize
        if shard and used + size > limit:
            yield shard, entries
            shard, entries, used = [], {}, 0
        names = hf_names(family, weight)
        shapes = stored_shapes(weight, spec, tensors=len(names))
        entries |= {n: Entry(dtype, s) for n, s in zip(names, shapes, strict=True)}
        shard.append(weight)
        used += size
    yield shard, entries


def _open_weight_files(folder: Path) -> list[SafetensorsFile] | list[TorchFile]:
    """Files of weights: safetensors where there are some, else what `torch.save` wrote."""
    if found := _listed(folder, _INDEX, _SINGLE):
        names, weight_map = found
        files = {name: SafetensorsFile(folder / name) for name in names}
        _check_index(folder, _INDEX, weight_map, {name: file.entries for name, file in files.items()})
        return list(files.values())
    if found := _listed(folder, _BIN_INDEX, _BIN):
        names, weight_map = found
        whole = FolderFiles(folder)
        if missing := sorted(set(names) - set(whole.names())):
            raise CheckpointError(f"{folder / missing[0]}: no such file")
        opened = {name: TorchFile(whole, name) for name in names}
        _check_index(folder, _BIN_INDEX, weight_map, {name: file.entries for name, file in opened.items()})
        return list(opened.values())
    raise CheckpointError(
        f"{folder}: no {_SINGLE}, {_BIN} or an index of either",
        rule="weights as safetensors, or in the files of torch.save",
    )


def _listed(folder: Path, index: str, single: str) -> tuple[list[str], dict[str, str]] | None:
    """Names of the files of weights, and which of them holds each weight; None when neither file is there."""
    if (folder / index).is_file():
        weight_map = _read_json(folder / index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / index}: has no weight_map")
        return sorted({_plain_name(name, folder / index) for name in weight_map.values()}), weight_map
    return ([single], {}) if (folder / single).is_file() else None


def _check_index(
    folder: Path, index: str, weight_map: Mapping[str, str], held: Mapping[str, Mapping[str, Any]]
) -> None:
    for name, file in weight_map.items():
        if name not in held[file]:
            raise CheckpointError(f"{folder / file}: has no {name}, though {index} says so")


def _plain_name(name: Any, index: Path) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{index}: {name!r} is not the name of a file in this folder")
    return name


def _name_of(folder: Path) -> str:
    """Hub name of a folder in the hub's cache (`models--ORG--NAME/snapshots/HASH`), else the folder's own name."""
    path = folder.absolute()
    cached = path.parent.parent.name
    return "/".join(cached.split("--")[1:]) if cached.startswith("models--") else path.name


def _licence_of_card(card: Path) -> str | None:
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    found = (
        re.search(r"^license:\s*(\S+)\s*$", parts[1], re.MULTILINE)
        if len(parts) == 3 and not parts[0].strip()
        else None
    )
    return found.group(1) if found else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path.read_bytes(), where=str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
