"""Hugging Face folders: safetensors, `config.json`, tokenizer files."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.arch.families import Family, family_named, family_of_hf_config
from nemo_minitron.arch.families.keys import AXIS_KEYS
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import Weight, weight_named, weights
from nemo_minitron.checkpoints.files import staged_folder
from nemo_minitron.checkpoints.hf_experts import split_fused_experts, use_published_prefix
from nemo_minitron.checkpoints.hf_weights import INDEX, SINGLE, HfWeights
from nemo_minitron.checkpoints.parts import dtype_of, fuse_stored, split_stored, stored_shapes, widest
from nemo_minitron.checkpoints.plain_data import read_json, spec_of
from nemo_minitron.checkpoints.safetensors_file import Entry, SafetensorsWriter
from nemo_minitron.checkpoints.sidecar import left_files, travelling_names, with_tokenizer_json
from nemo_minitron.checkpoints.source import Checkpoint, TensorSource, check_tokenizer_fits, stream
from nemo_minitron.checkpoints.special_ids import IDS_FILE, ids_of, json_bytes, with_ids
from nemo_minitron.errors import CheckpointError, denied

SHARD_BYTES = 5_000_000_000
"""Largest weight file written; Hugging Face's own long-time default."""

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# Read by families, or written anew from the spec.
_CARRIED_KEYS = (
    *("architectures", "model_type", "torch_dtype", "dtype", "minitron", "_name_or_path", "transformers_version"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor", "layer_types"),
    *("attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers", "sliding_window_pattern"),
    *("sliding_window", "attention_dropout", "initializer_range", "use_cache", "pretraining_tp", "resid_pdrop"),
    *("embd_pdrop", "original_max_position_embeddings", "attn_logit_softcapping", "final_logit_softcapping"),
    *("use_bidirectional_attention", "hidden_activation", "hidden_act", "_sliding_window_pattern"),
    *("quantization_config", "num_experts", "num_local_experts", "output_router_logits", "router_aux_loss_coef"),
    "router_jitter_noise",
)
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
# Buffers that old versions of transformers saved beside the weights.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")


def open_hf(folder: Path) -> Checkpoint:
    """Open a Hugging Face folder: safetensors, or `pytorch_model.bin` files of before them.

    Raises:
        CheckpointError: A file is missing or damaged, a weight is missing, unknown or of the wrong shape, or
            the tokenizer does not fit the vocabulary.
        SpecError: The architecture is not supported.
    """
    reader = _Reader(folder)
    return Checkpoint(
        spec=reader.spec,
        family=reader.family.name,
        dtype=reader.dtype,
        lineage=reader.lineage(),
        format="Hugging Face",
        layout=reader.layout(),
        files=lambda: reader.files,
        get=reader.get,
        notes=reader.notes,
    )


class _Reader:
    """What the file or folder holds, checked; see `open_hf`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = _read_json(folder / "config.json")
        if self._config.get("quantization_config") is not None:  # null says that they are not
            raise CheckpointError(
                f"{folder}: the weights are quantised (quantization_config)", rule="fp32, bf16 or fp16 weights"
            )
        self.family = family_of_hf_config(self._config)
        self.spec = spec_of(
            lambda: self.family.read_config(self._config), self._config, where=f"{folder / 'config.json'}"
        )
        self._weights = HfWeights(folder)
        for name in [name for name in self._weights.places if _DERIVED.search(name)]:
            del self._weights.places[name]
        use_published_prefix(self._weights.places, self.family)
        if self.spec.tied_embeddings:
            self._settle_tied()
        if self.spec.has_experts:
            split_fused_experts(self._weights.places, self.family, self.spec)
        self._check_names()
        self._flexible = sorted(name for w in weights(self.spec) if not w.row.fp32 for name in hf_names(self.family, w))
        self.dtype = widest([self._weights.places[name].entry.dtype for name in self._flexible])
        self.files = self._read_tokenizer_files()
        self._tokenizer_notes = check_tokenizer_fits(self.files, self.spec, where=str(folder))

    def lineage(self) -> dict[str, Any]:
        """What `write_hf` recorded; for a foreign folder its name and the licence of its model card."""
        recorded = self._config.get("minitron")
        if isinstance(recorded, dict) and isinstance(recorded.get("lineage"), dict):
            return dict(recorded["lineage"])
        name = self._config.get("_name_or_path") or _name_of(self.folder)
        return {"base_model": name, "license": _licence_of_card(self.folder / "README.md"), "format": "hf"}

    def layout(self) -> str:
        """How the weights are stored."""
        count = len(self._weights.files)
        return f"{self._weights.kind} ({count} file{'s' if count > 1 else ''})"

    def get(self, name: str) -> Tensor:
        """One canonical tensor; q, k, v and gate, up are fused."""
        weight = weight_named(self.spec, name)
        dtype = dtype_of(weight, self.dtype)
        parts = [self._weights.places[part].get().to(dtype) for part in hf_names(self.family, weight)]
        return fuse_stored(parts, weight, self.spec)

    def notes(self) -> tuple[str, ...]:
        """What is assumed because the folder does not say it, and what of the folder goes nowhere."""
        config, cls = self._config, self.family.hf_architecture
        found = [
            f"config.json has no {key}: {value!r} is the default of {cls}"
            for key, value in self.family.assumed(config).items()
        ]
        found += self._tokenizer_notes
        if self._weights.unread:
            found.append(f"not read, beside the {self._weights.kind}: {', '.join(self._weights.unread)}")
        dtypes = [self._weights.places[name].entry.dtype for name in self._flexible]
        types = Counter(str(dtype).removeprefix("torch.") for dtype in dtypes)
        if len(types) > 1:
            kinds = ", ".join(f"{count} {name}" for name, count in types.most_common())
            found.append(f"weights of several types ({kinds}): all are read as {str(self.dtype)[6:]}, losing nothing")
        if left := left_files(self.folder, (*self.files, *self._weights.files, *self._weights.unread)):
            found.append(f"files that are not carried on: {', '.join(left)}")
        known = {*self.family.defaults, *self.family.settings, *_CARRIED_KEYS}
        if keys := sorted(set(config) - known):
            found.append(f"keys of config.json that are not carried on: {', '.join(keys)}")
        return tuple(found)

    def _read_tokenizer_files(self) -> dict[str, bytes]:
        files = {name: (self.folder / name).read_bytes() for name in travelling_names(self.folder)}
        files = with_tokenizer_json(files, where=str(self.folder))
        return with_ids(files, self.family.special_ids(self._config))

    def _settle_tied(self) -> None:
        """One matrix under the name of the embedding: some writers store it twice, some under the other name.

        Raises:
            CheckpointError: The two differ.
        """
        (table,), (head,) = (self.family.hf_names[name] for name in (_EMBEDDING, _OUTPUT))
        places = self._weights.places
        if head not in places:
            return
        if table not in places:
            places[table] = places[head]
        elif not places[table].same_as(places[head]):
            raise CheckpointError(
                f"{self.folder}: tie_word_embeddings = true, but {head} and {table} differ",
                rule="a tied model has one matrix for both; transformers 5 unties them, older ones drop the first",
                remedy="set tie_word_embeddings in config.json to false, or take the wrong tensor out",
            )
        del places[head]

    def _check_names(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        weight_of: dict[str, Weight] = {}
        for weight in weights(self.spec):
            names = hf_names(self.family, weight)
            expected |= dict(zip(names, stored_shapes(weight, self.spec, tensors=len(names)), strict=True))
            weight_of |= dict.fromkeys(names, weight)
        places = self._weights.places
        if missing := sorted(set(expected) - set(places)):
            keys = "num_hidden_layers" if weight_of[missing[0]].layer is not None else "tie_word_embeddings"
            raise CheckpointError(
                f"{self.folder}: {len(missing)} weight(s) missing, {missing[0]} first",
                rule=f"every weight that config.json implies is there ({self._saying(keys)})",
                remedy="the download may be incomplete, or config.json of another model",
            )
        if extra := sorted(set(places) - set(expected)):
            raise CheckpointError(
                f"{self.folder}: {len(extra)} weight(s) unknown in a {self.family.name} model, {extra[0]} first",
                rule=f"no weight is left out in silence ({self._saying('num_hidden_layers', 'model_type')})",
                remedy="is model_type in config.json right, and is this a plain causal language model?",
            )
        for name, shape in expected.items():
            if (stored := tuple(places[name].entry.shape)) != shape:
                keys_ = dict.fromkeys(key for axis in weight_of[name].row.axes for key in AXIS_KEYS[axis])
                raise CheckpointError(
                    f"{self.folder}: {name} is shaped {stored}",
                    rule=f"config.json implies {shape} ({self._saying(*keys_)})",
                )

    def _saying(self, *keys: str) -> str:
        """What the configuration says about some keys, for messages."""
        assumed = self.family.assumed(self._config)
        words = [
            f"{key} = {self._config.get(key, self.family.defaults.get(key))}{', a default' if key in assumed else ''}"
            for key in keys
            if key in self._config or key in self.family.defaults
        ]
        return ", ".join(words)


def read_architecture(path: Path) -> ModelSpec:
    """The architecture that a `config.json` describes, whether weights lie beside it or not.

    Raises:
        CheckpointError: The file cannot be read.
        SpecError: The architecture is not supported.
    """
    config = _read_json(path)
    return spec_of(lambda: family_of_hf_config(config).read_config(config), config, where=str(path))


def read_family(path: Path) -> str:
    """The family of that model.

    Raises:
        CheckpointError: The file cannot be read.
        SpecError: The family is not supported.
    """
    return family_of_hf_config(_read_json(path)).name


def hf_names(family: Family, weight: Weight) -> tuple[str, ...]:
    """Hugging Face names of a weight's parts, in packing order; one name where they lie in one tensor.

    Raises:
        CheckpointError: The family has no such weight.
    """
    if weight.row.name not in family.hf_names:
        raise CheckpointError(f"{weight.name} has no Hugging Face name in family {family.name}")
    return tuple(name.format(i=weight.layer, e=weight.expert) for name in family.hf_names[weight.row.name])


def hf_config(
    spec: ModelSpec, family: str, *, dtype: torch.dtype, files: Mapping[str, bytes], lineage: dict[str, Any]
) -> dict[str, Any]:
    """`config.json` data: architecture, special token ids, type, lineage.

    Ids that nobody named are null: the class has defaults for them, which would be other tokens.
    """
    config = family_named(family).write_config(spec)
    config |= ids_of(files)
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

    No weight file is larger than `shard_bytes`, unless one tensor alone is. `extra_files` are more files by name,
    as a model card.

    Raises:
        SpecError: The family's `config.json` cannot say this architecture (layers of different sizes).
    """
    dtype = dtype or source.dtype
    files = source.tokenizer_files()
    config = hf_config(source.spec, source.family, dtype=dtype, files=files, lineage=source.lineage)
    with staged_folder(folder) as partial:
        _write_weights(source, partial, dtype, shard_bytes)
        for name, data in (*files.items(), *(extra_files or {}).items()):
            if name == IDS_FILE:  # config.json says it
                continue
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(data)
        (partial / "config.json").write_bytes(json_bytes(config))


def _write_weights(source: TensorSource, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    family = family_named(source.family)
    shards = list(_shards(source.spec, family, dtype, shard_bytes))
    single = len(shards) == 1
    file_names = [SINGLE if single else f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
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
                    writer.write(part_name, part.to(dtype_of(weight, dtype)))
    if not single:
        placed = {name: file for file, (_, entries) in zip(file_names, shards, strict=True) for name in entries}
        total = sum(entry.nbytes for _, entries in shards for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_bytes(json_bytes(index))


def _shards(
    spec: ModelSpec, family: Family, dtype: torch.dtype, limit: int
) -> Iterator[tuple[list[Weight], dict[str, Entry]]]:
    """Consecutive weights and their parts' entries, together at most `limit` bytes."""
    shard: list[Weight] = []
    entries: dict[str, Entry] = {}
    used = 0
    for weight in weights(spec):
        size = weight.numel * dtype_of(weight, dtype).itemsize
        if shard and used + size > limit:
            yield shard, entries
            shard, entries, used = [], {}, 0
        names = hf_names(family, weight)
        shapes = stored_shapes(weight, spec, tensors=len(names))
        entries |= {n: Entry(dtype_of(weight, dtype), s) for n, s in zip(names, shapes, strict=True)}
        shard.append(weight)
        used += size
    yield shard, entries


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
    except PermissionError as error:
        raise denied(error) or error from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
