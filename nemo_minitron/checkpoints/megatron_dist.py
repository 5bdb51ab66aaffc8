"""Megatron-LM's and Megatron-Bridge's checkpoints: folders in torch_dist form, keys without a prefix.

    latest_checkpointed_iteration.txt    "1", or "release"
    iter_0000001/                        or release/
        .metadata  __0_0.distcp  metadata.json
        common.pt                        Megatron-LM: the training's arguments under `args`
        run_config.yaml                  Megatron-Bridge: the model's fields under `model`
        minitron.json                    ours: the architecture complete, and the lineage
        tokenizer/                       Hugging Face files

Of a training's checkpoint the weights are read; optimizer, schedule and random states are passed over.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_minitron.arch.families import recorded_family
from nemo_minitron.arch.megatron_config import (
    contradictions,
    is_representable,
    megatron_args,
    rope_fields,
    spec_from_args,
    spec_from_transformer_fields,
    transformer_fields,
)
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.files import Files, FolderFiles, read_bytes, staged_folder
from nemo_minitron.checkpoints.layouts import checkpoint_of, open_weights
from nemo_minitron.checkpoints.megatron_writer import write_weights
from nemo_minitron.checkpoints.plain_data import read_json, read_yaml, refuse_code, spec_of
from nemo_minitron.checkpoints.sidecar import order_of
from nemo_minitron.checkpoints.source import Checkpoint, TensorSource
from nemo_minitron.checkpoints.torch_file import read_common_file
from nemo_minitron.errors import CheckpointError, SpecError

LATEST = "latest_checkpointed_iteration.txt"
OURS = "minitron.json"
TOKENIZER_FOLDER = "tokenizer"
_ITERATION = "iter_0000001"
_RUN_CONFIG = "run_config.yaml"
_COMMON = "common.pt"
_NOT_REPRESENTABLE = "nemo_minitron.unsayable.ModelProvider"
"""In place of a class where Bridge's fields cannot say what the model computes: Bridge stops, it does not guess."""
_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"


def open_megatron(folder: Path) -> Checkpoint:
    """Open a Megatron-LM or Megatron-Bridge checkpoint.

    The folder is that of an iteration, or the one above, whose latest iteration is taken.

    Raises:
        CheckpointError: A file is missing or damaged or asks for code, a weight is missing, unknown or of the wrong
            shape, or the tokenizer does not fit the vocabulary.
        SpecError: The architecture is not supported, or neither arguments nor a run configuration describe it.
    """
    folder = iteration_folder(folder)
    files = FolderFiles(folder)
    weights = open_weights(files, "")
    ours = read_ours(files, OURS)
    spec = _read_spec(files, folder, ours, rows=weights.vocab_rows())
    return checkpoint_of(
        weights,
        spec,
        family=recorded_family(ours, spec),
        lineage=recorded_lineage(ours, name=_name_of(folder), format="megatron"),
        format="Megatron",
        read_files=lambda: travelling_files(files, TOKENIZER_FOLDER),
        where=str(folder),
    )


def _read_spec(files: FolderFiles, folder: Path, ours: Mapping[str, Any], *, rows: int) -> ModelSpec:
    if _RUN_CONFIG in files.names():
        where = f"{folder / _RUN_CONFIG}"
        fields = read_yaml(read_bytes(files, _RUN_CONFIG), where=where).get("model")
        if not isinstance(fields, dict):
            raise SpecError(f"{where}: model is missing", rule="the fields of a model provider")
        refuse_code(fields, where=where)
        fields = named_functions(fields)
        found = lambda: spec_from_transformer_fields(fields, vocab_rows=rows, where=where)  # noqa: E731
        return recorded_spec(ours, fields, where=where) or spec_of(found, fields, where=where)
    where = f"{folder / _COMMON}"
    args = read_common_file(files, _COMMON).get("args") if _COMMON in files.names() else None
    if not isinstance(args, dict):
        raise SpecError(
            f"{folder}: neither {_RUN_CONFIG} nor arguments in {_COMMON} describe the model",
            rule="a checkpoint of Megatron-LM or Megatron-Bridge",
        )
    read = lambda: spec_from_args(args, vocab_rows=rows, where=where)  # noqa: E731
    return recorded_spec(ours, args, where=where, args=True) or spec_of(read, args, where=where)


def is_megatron_folder(path: Path) -> bool:
    """Whether a folder is an iteration of Megatron's, or holds some."""
    inside = (path / ".metadata").is_file() or (path / "metadata.json").is_file()
    return (path / LATEST).is_file() or inside or any(path.glob("iter_*")) or (path / "release").is_dir()


def iteration_folder(folder: Path) -> Path:
    """The folder of the weights: the given one, or its latest iteration.

    Raises:
        CheckpointError: The iteration named by `latest_checkpointed_iteration.txt` is not there.
    """
    if (folder / "metadata.json").is_file() or (folder / ".metadata").is_file():
        return folder
    if (folder / LATEST).is_file():
        with (folder / LATEST).open("rb") as file:
            word = file.read(64).decode("ascii", errors="replace").strip()
        name = f"iter_{int(word):07d}" if word.isascii() and word.isdigit() else word
        if not (word.isdigit() or word == "release") or not (folder / name).is_dir():
            raise CheckpointError(
                f"{folder / LATEST}: names {word[:40]!r}, which is not there",
                rule="the number of an iteration, or 'release'",
                remedy="name the folder of an iteration itself",
            )
        return folder / name
    found = sorted(path for path in (*folder.glob("iter_*"), *folder.glob("release")) if path.is_dir())
    if not found:
        raise CheckpointError(f"{folder}: holds no iteration", rule="a folder iter_XXXXXXX or release")
    return found[-1]


def write_megatron(
    source: TensorSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint that Megatron-LM (`--finetune --use-checkpoint-args`) and Megatron-Bridge load.

    One tensor is in memory at a time. Equal sources give equal bytes.

    `extra_files` have no place in this format.
    """
    dtype = dtype or source.dtype
    spec = source.spec
    with staged_folder(folder) as partial:
        weights = partial / _ITERATION
        weights.mkdir()
        write_weights(source, weights, prefix="", dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        args = argparse.Namespace(**megatron_args(spec, dtype=name), **_training_args(dtype))
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1}, weights / _COMMON)
        (weights / _RUN_CONFIG).write_text(_yaml({"model": _provider(spec, name)}), encoding="utf-8")
        write_sidecar(weights, TOKENIZER_FOLDER, source)
        (partial / LATEST).write_text("1", encoding="ascii")


def write_sidecar(folder: Path, name: str, source: TensorSource) -> None:
    """Write `minitron.json` into a folder, and tokenizer files and what travels with them into a folder below it."""
    (folder / OURS).write_text(json.dumps(ours(source), indent=2) + "\n", encoding="utf-8")
    files = source.tokenizer_files()
    if files:
        (folder / name).mkdir()
    for file, data in files.items():
        (folder / name / file).parent.mkdir(exist_ok=True)
        (folder / name / file).write_bytes(data)


def ours(source: TensorSource) -> dict[str, Any]:
    """What the formats of others have no place for."""
    return {
        "format": "nemo_minitron",
        "spec": source.spec.to_dict(),
        "family": source.family,
        "lineage": dict(source.lineage),
    }


def read_ours(files: Files, name: str) -> dict[str, Any]:
    """`minitron.json`; {} where there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    if name not in files.names():
        return {}
    where = f"{files.label}/{name}"
    found = read_json(read_bytes(files, name), where=where)
    if not isinstance(found.get("spec"), dict) or not isinstance(found.get("lineage"), dict):
        raise CheckpointError(f"{where}: spec or lineage is missing")
    return found


def recorded_spec(
    ours: Mapping[str, Any], fields: Mapping[str, Any], *, where: str, args: bool = False
) -> ModelSpec | None:
    """The architecture of `minitron.json`, if there is one and the configuration beside it says the same.

    `fields` are those of NeMo 2 or Bridge, or, with `args`, the arguments of Megatron-LM.

    Raises:
        SpecError: They contradict each other.
    """
    if not ours:
        return None
    data = ours["spec"]
    spec = spec_of(lambda: ModelSpec.from_dict(data), {"num_layers": _count(data)}, where=where)
    for key, found, expected in contradictions(spec, fields, args=args):
        raise SpecError(
            f"{where}: {key} = {str(found)[:40]}, but {OURS} says {expected}",
            rule="both describe the weights",
            remedy="change sizes by pruning, not by editing the file",
        )
    return spec


def recorded_lineage(ours: Mapping[str, Any], *, name: str, format: str) -> dict[str, Any]:
    """What the writer recorded; for a foreign folder its name."""
    known = ours.get("lineage")
    return dict(known) if known else {"base_model": name, "license": None, "format": format}


def travelling_files(files: Files, folder: str) -> dict[str, bytes]:
    """Tokenizer files and what travels with them out of a folder of a checkpoint."""
    start = f"{folder}/"
    inside = [name.removeprefix(start) for name in files.names() if name.startswith(start)]
    return {name: read_bytes(files, start + name) for name in order_of(inside)}


def named_functions(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with `{"_target_": "torch.nn.functional.silu", ...}` replaced by the name."""
    return {
        key: value["_target_"] if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in fields.items()
    }


def _count(data: Mapping[str, Any]) -> Any:
    layers = data.get("layers")
    return layers.get("count") if isinstance(layers, Mapping) else len(layers) if isinstance(layers, list) else None


def _provider(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """The model provider that Bridge builds."""
    fields = transformer_fields(spec)
    rope = rope_fields(spec)
    default_rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    representable = (
        is_representable(spec)
        and not spec.scaled_embeddings
        and all(rope.get(k, v) == v for k, v in default_rope.items())
    )
    fields["activation_func"] = {"_target_": fields["activation_func"], "_call_": False}
    return {
        "_target_": _PROVIDER if representable else _NOT_REPRESENTABLE,
        **fields,
        "rope_scaling": bool(rope),
        "rope_scaling_factor": rope.get("scale_factor", 8.0),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
    }


def _training_args(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments that Megatron-LM and Bridge look up without a default."""
    absent = (
        *("heterogeneous_layers_config_path", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("config_logger_dir", "tokenizer_model", "virtual_pipeline_model_parallel_size"),
    )
    false = (
        *(
            "multi_latent_attention",
            "no_persist_layer_norm",
            "overlap_p2p_comm",
            "fp8_param_gather",
            "use_legacy_models",
        ),
        *("bias_swiglu_fusion", "bias_gelu_fusion", "init_method_xavier_uniform", "is_hybrid_model"),
    )
    return {
        **dict.fromkeys(absent),
        **dict.fromkeys(false, False),
        "cp_comm_type": ["p2p"],
        "params_dtype": dtype,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "tokenizer_type": "HuggingFaceTokenizer",
    }


def _yaml(data: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    return text


def _name_of(folder: Path) -> str:
    iteration = folder.name.startswith("iter_") or folder.name == "release"
    return (folder.absolute().parent if iteration else folder.absolute()).name
