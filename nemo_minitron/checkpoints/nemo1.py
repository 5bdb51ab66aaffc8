"""NeMo-1 checkpoints: a `.nemo` file (a tar), or the same unpacked, which we call a checkpoint folder.

    model_config.yaml               NeMo-1 keys; everything of ours under `minitron:`
    model_weights/                  torch_dist, keys with the prefix `model.`
    <32 hex digits>_tokenizer.json  tokenizer artifacts, one file each, the digits from their content

In torch_dist, layers of one size are stacked: `model.decoder.layers.mlp.linear_fc2.weight` is `[layers, h, ffn]`, one
piece per layer. Layers that differ keep a key each: `model.decoder.layers.7.mlp.linear_fc2.weight`. Both are
Megatron-Core's own conventions, so its `dist_checkpointing` loads the folder at any layout.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_minitron.arch.families import recorded_family
from nemo_minitron.arch.nemo_config import lineage_of, nemo_config, spec_from_nemo_config
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.files import (
    Files,
    FolderFiles,
    open_files,
    read_bytes,
    scratch_folder,
    staged_file,
    staged_folder,
)
from nemo_minitron.checkpoints.large_files import open_binary
from nemo_minitron.checkpoints.layouts import checkpoint_of, open_weights
from nemo_minitron.checkpoints.megatron_weights import DistributedWeights, Weights
from nemo_minitron.checkpoints.megatron_writer import write_weights
from nemo_minitron.checkpoints.plain_data import read_yaml, refuse_code, spec_of
from nemo_minitron.checkpoints.sidecar import order_of, travels
from nemo_minitron.checkpoints.source import Checkpoint, TensorSource
from nemo_minitron.checkpoints.torch_dist import TorchDistReader
from nemo_minitron.errors import CheckpointError

CONFIG_FILE = "model_config.yaml"
WEIGHTS_FOLDER = "model_weights"
KEY_PREFIX = "model."

_COPY_BYTES = 8 << 20
_ARTIFACT = re.compile(r"^[0-9a-f]{32}_(.+)$")
# Keys of NeMo-1's `tokenizer` section that name a file, by library, with what Hugging Face calls such a file.
_ARTIFACT_KEYS: dict[str, dict[str, str]] = {
    "sentencepiece": {"model": "tokenizer.model", "tokenizer_model": "tokenizer.model"},
    "megatron": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    "huggingface": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
}
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "16", torch.float32: "32"}


def open_nemo(path: Path) -> Checkpoint:
    """Open a `.nemo` file or checkpoint folder, in any layout NeMo-1 wrote; a tar is read in place.

    Raises:
        CheckpointError: A file is missing or damaged or asks for code, a weight is missing, unknown or of the wrong
            shape, or the tokenizer does not fit the vocabulary.
        SpecError: The architecture is not supported.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    archive = open_files(path)
    config = read_config(archive)
    weights = open_weights(archive, WEIGHTS_FOLDER)
    rows = weights.vocab_rows()
    spec = spec_of(lambda: spec_from_nemo_config(config, vocab_size=rows), config, where=f"{path}: {CONFIG_FILE}")
    known = (config.get("tokenizer") or {}).get("type")
    found = checkpoint_of(
        weights,
        spec,
        family=recorded_family(config.get("minitron") or {}, spec),
        lineage=lineage_of(config) or {"base_model": known or path.stem, "license": None, "format": "nemo"},
        format="NeMo 1",
        read_files=lambda: tokenizer_files_in(archive, config),
        where=str(path),
    )
    native = path if path.is_dir() and _is_native(weights) else None
    return replace(found, config=config, native=native, notes=lambda: (*found.notes(), *_notes(config, found.files())))


def _is_native(weights: Weights) -> bool:
    """Whether weights are in torch_dist form, with our prefix."""
    if not isinstance(weights, DistributedWeights) or not isinstance(weights.store, TorchDistReader):
        return False
    return weights.prefix == KEY_PREFIX


def _notes(config: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[str, ...]:
    """What the configuration names and the file does not carry."""
    section = config.get("tokenizer") or {}
    named = section.get("type") or section.get("model")
    if named and not any(name in files for name in ("tokenizer.json", "tokenizer.model")):
        return (f"tokenizer {str(named)[:80]!r} (library {section.get('library')}) is named, not carried",)
    return ()


def write_folder(source: TensorSource, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint folder, one tensor in memory at a time. Equal sources give equal bytes."""
    dtype = dtype or source.dtype
    with staged_folder(folder) as partial:
        (partial / WEIGHTS_FOLDER).mkdir()
        write_weights(source, partial / WEIGHTS_FOLDER, prefix=KEY_PREFIX, dtype=dtype)
        write_folder_files(
            partial,
            spec=source.spec,
            family=source.family,
            dtype=dtype,
            tokenizer_files=source.tokenizer_files(),
            lineage=source.lineage,
        )


def write_nemo(
    source: TensorSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a `.nemo` file, or a checkpoint folder where the name has no such ending.

    A folder that is native already is packed as it is. `extra_files` are more members of the archive by name.
    """
    if target.suffix != ".nemo":
        write_folder(source, target, dtype=dtype)
        return
    if isinstance(source, Checkpoint) and source.native is not None and dtype in (None, source.dtype):
        pack_nemo(source.native, target, extra_files=extra_files)
        return
    with scratch_folder(target) as scratch:
        write_folder(source, scratch / "folder", dtype=dtype)
        pack_nemo(scratch / "folder", target, extra_files=extra_files)


def write_folder_files(
    folder: Path,
    *,
    spec: ModelSpec,
    family: str,
    dtype: torch.dtype,
    tokenizer_files: Mapping[str, bytes],
    lineage: Mapping[str, Any],
) -> None:
    """Write all of a checkpoint folder but `model_weights/`, for weights that Megatron saves from all ranks.

    Artifact names begin with digits of their content's hash (NeMo takes random ones), so that equal input gives equal
    bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = {
        name: f"{hashlib.sha256(data).hexdigest()[:32]}_{name.replace('/', '__')}"
        for name, data in tokenizer_files.items()
    }
    config = nemo_config(
        spec,
        family=family,
        precision=_PRECISIONS.get(dtype, "32"),
        tokenizer=_tokenizer_section(artifacts, lineage),
        minitron={
            "lineage": dict(lineage),
            "tokenizer_files": {name: f"nemo:{artifact}" for name, artifact in sorted(artifacts.items())},
        },
    )
    for name, data in tokenizer_files.items():
        with staged_file(folder / artifacts[name]) as partial:
            partial.write_bytes(data)
    with staged_file(folder / CONFIG_FILE) as partial:
        partial.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def pack_nemo(folder: Path, file: Path, *, extra_files: Mapping[str, bytes] | None = None) -> None:
    """Pack a checkpoint folder into a `.nemo` file. Equal folders give equal bytes.

    `extra_files` are more members by name, as a model card. The folder stays as it is.

    Raises:
        CheckpointError: The folder is not a complete checkpoint.
    """
    open_nemo(folder)
    files = FolderFiles(folder)
    names = sorted(files.names(), key=lambda name: (name != CONFIG_FILE, "/" in name, name))
    with (
        staged_file(file) as partial,
        open_binary(partial, "wb", nbytes=sum(map(files.size, names))) as whole,
        tarfile.open(fileobj=whole, mode="w:", format=tarfile.PAX_FORMAT, copybufsize=_COPY_BYTES) as archive,  # type: ignore[call-overload]
    ):
        for directory in ("./", f"./{WEIGHTS_FOLDER}"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name in names:
            entry = tarfile.TarInfo(f"./{name}")
            entry.size, entry.mode = files.size(name), 0o644
            with files.open(name) as stream_:
                archive.addfile(entry, stream_)
        for name, data in (extra_files or {}).items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))


def read_config(files: Files) -> dict[str, Any]:
    """`model_config.yaml` as plain data.

    Raises:
        CheckpointError: It is missing, not YAML, too large, or names code (`_target_`) beyond what models are made of.
    """
    config = read_yaml(read_bytes(files, CONFIG_FILE), where=f"{files.label}: {CONFIG_FILE}")
    refuse_code(config, where=f"{files.label}: {CONFIG_FILE}")
    for key in ("minitron", "tokenizer"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{files.label}: {CONFIG_FILE}: {key} is not a mapping")
    return config


def tokenizer_files_in(files: Files, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Tokenizer files kept as artifacts: those that the config names, else those whose own names say so.

    Raises:
        CheckpointError: A named artifact is missing, or is to be called by the name of another kind of file: these
            names are written to folders later.
    """
    named = (config.get("minitron") or {}).get("tokenizer_files")
    if isinstance(named, Mapping) and named:  # by our writer
        if strange := sorted(str(name) for name in named if not travels(str(name))):
            raise CheckpointError(
                f"{files.label}: {CONFIG_FILE}: minitron.tokenizer_files names {strange[0][:80]!r}",
                rule="files of a tokenizer, a licence or a pruning plan",
            )
        return {str(name): read_bytes(files, str(value).removeprefix("nemo:")) for name, value in named.items()}
    found: dict[str, str] = {}
    for artifact in files.names():
        name = match.group(1) if (match := _ARTIFACT.match(artifact)) else artifact
        if not travels(name):
            continue
        if name in found and read_bytes(files, artifact) != read_bytes(files, found[name]):
            raise CheckpointError(
                f"{files.label}: {found[name]} and {artifact} are both a {name}, and differ",
                rule="one tokenizer; the configuration names none of the two",
                remedy=f"name the right one under tokenizer in {CONFIG_FILE}, or take the other out",
            )
        found.setdefault(name, artifact)
    found |= _named_artifacts(files, config)
    return {name: read_bytes(files, found[name]) for name in order_of(found)}


def _named_artifacts(files: Files, config: Mapping[str, Any]) -> dict[str, str]:
    """Artifacts that NeMo-1's `tokenizer` section names, whatever they are called, by the names of Hugging Face.

    Raises:
        CheckpointError: One is not there.
    """
    section = config.get("tokenizer") or {}
    keys = _ARTIFACT_KEYS.get(str(section.get("library")), {})
    found: dict[str, str] = {}
    for key, name in keys.items():
        value = section.get(key)
        if not isinstance(value, str) or not value:
            continue
        artifact = value.removeprefix("nemo:")
        if artifact in files.names():
            found[name] = artifact
        elif value.startswith("nemo:"):
            raise CheckpointError(
                f"{files.label}: {CONFIG_FILE}: tokenizer.{key} = {value[:80]!r}, which is not there",
                rule="an artifact that the configuration names lies in the file",
                remedy="fetch the file again, or save it again from NeMo",
            )
    return found


def _tokenizer_section(artifacts: Mapping[str, str], lineage: Mapping[str, Any]) -> dict[str, Any]:
    """NeMo-1's `tokenizer` keys: Hugging Face tokenizers by hub name, a sentencepiece model as an artifact."""
    if "tokenizer.model" in artifacts:
        model = f"nemo:{artifacts['tokenizer.model']}"
        return {"library": "sentencepiece", "type": None, "model": model, "vocab_file": None, "merge_file": None}
    return {
        "library": "huggingface",
        "type": lineage.get("base_model"),
        "model": None,
        "vocab_file": None,
        "merge_file": None,
        "use_fast": True,
    }
