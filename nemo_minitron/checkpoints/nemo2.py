"""NeMo-2 checkpoints: a folder of context and weights.

    context/model.yaml       the model and its configuration, every field written out
    context/io.json          the same as NeMo 2 rebuilds it from
    context/nemo_tokenizer/  Hugging Face files
    context/minitron.json    ours: the architecture complete, and the lineage
    weights/                 torch_dist (or zarr), keys with the prefix `module.`

NeMo 2 builds what `io.json` names, by importing it. Nothing is imported here: both files are read as data.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_minitron.arch.families import recorded_family
from nemo_minitron.arch.megatron_config import (
    is_representable,
    rope_fields,
    spec_from_transformer_fields,
    transformer_fields,
)
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.fiddle_json import FiddleDocument, Symbol, arguments_at
from nemo_minitron.checkpoints.files import FolderFiles, read_bytes, staged_folder
from nemo_minitron.checkpoints.layouts import checkpoint_of, open_weights
from nemo_minitron.checkpoints.megatron_dist import (
    OURS,
    named_functions,
    read_ours,
    recorded_lineage,
    recorded_spec,
    travelling_files,
    write_sidecar,
)
from nemo_minitron.checkpoints.megatron_writer import write_weights
from nemo_minitron.checkpoints.plain_data import read_json, read_yaml, refuse_code, spec_of
from nemo_minitron.checkpoints.source import Checkpoint, TensorSource
from nemo_minitron.errors import CheckpointError

CONTEXT, WEIGHTS = "context", "weights"
KEY_PREFIX = "module."
_TOKENIZER = "nemo_tokenizer"
_MODEL_YAML, _IO_JSON = "model.yaml", "io.json"
_MODELS = "nemo.collections.llm.gpt.model."
# Family to NeMo 2's module, class of the model, class of its configuration.
_CLASSES: dict[str, tuple[str, str, str]] = {
    "llama": ("llama", "LlamaModel", "LlamaConfig"),
    "mistral": ("mistral", "MistralModel", "MistralConfig7B"),
    "qwen2": ("qwen2", "Qwen2Model", "Qwen2Config"),
    "qwen3": ("qwen3", "Qwen3Model", "Qwen3Config"),
    "nemotron": ("nemotron", "NemotronModel", "NemotronConfig"),
    "phi3": ("phi3mini", "Phi3Model", "Phi3Config"),
    "gemma": ("gemma", "GemmaModel", "GemmaConfig"),
}
_NOT_REPRESENTABLE = ("nemo_minitron.unsayable.Model", "nemo_minitron.unsayable.Config")
"""In place of classes where NeMo 2's fields cannot say what the model computes: NeMo 2 stops, it does not guess."""
_AUTO_TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
_TRAINER_CONTEXT = "nemo.lightning.io.pl.TrainerContext"


def open_nemo2(folder: Path) -> Checkpoint:
    """Open a NeMo-2 folder.

    Raises:
        CheckpointError: A file is missing or damaged or names code, a weight is missing, unknown or of the wrong shape,
            or the tokenizer does not fit the vocabulary.
        SpecError: The architecture is not supported, or not written out.
    """
    context = _Context(folder)
    weights = open_weights(context.files, WEIGHTS)
    ours = read_ours(context.files, context.prefix + OURS)
    model = context.read_model()
    refuse_code(model, where=f"{folder / context.prefix}")
    spec = _read_spec(model.get("config"), ours, rows=weights.vocab_rows(), where=f"{folder / CONTEXT}")
    return checkpoint_of(
        weights,
        spec,
        family=recorded_family(ours, spec),
        lineage=recorded_lineage(ours, name=folder.absolute().name, format="nemo2"),
        format="NeMo 2",
        read_files=lambda: context.tokenizer_files(model),
        where=str(folder),
    )


def _read_spec(config: Any, ours: Mapping[str, Any], *, rows: int, where: str) -> ModelSpec:
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: the model has no config")
    fields = named_functions(config)
    found = recorded_spec(ours, fields, where=where)
    return found or spec_of(
        lambda: spec_from_transformer_fields(fields, vocab_rows=rows, where=where), fields, where=where
    )


class _Context:
    """The folder that describes the model; its files may lie in the folder above, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = FolderFiles(folder)
        inside = any(name.startswith(f"{CONTEXT}/") for name in self.files.names())
        self.prefix = f"{CONTEXT}/" if inside else ""

    def tokenizer_files(self, model: Mapping[str, Any]) -> dict[str, bytes]:
        """Files of the tokenizer that the model names, and what travels with them."""
        found = travelling_files(self.files, self.prefix + self._tokenizer_folder(model))
        return found | self._named_model(model)

    def read_model(self) -> dict[str, Any]:
        """The model's arguments as plain data; `model.yaml` has every default written out, `io.json` has not."""
        names = self.files.names()
        if self.prefix + _MODEL_YAML in names:
            where = f"{self.folder / self.prefix / _MODEL_YAML}"
            return read_yaml(read_bytes(self.files, self.prefix + _MODEL_YAML), where=where)
        if self.prefix + _IO_JSON in names:
            where = f"{self.folder / self.prefix / _IO_JSON}"
            document = read_json(read_bytes(self.files, self.prefix + _IO_JSON), where=where)
            parts = {name: arguments_at(document, f"model.{name}", where=where) for name in ("config", "tokenizer")}
            return {**arguments_at(document, "model", where=where), **parts}
        raise CheckpointError(
            f"{self.folder}: has neither {CONTEXT}/{_MODEL_YAML} nor {CONTEXT}/{_IO_JSON}",
            rule="the context describes the model",
        )

    def _tokenizer_folder(self, model: Mapping[str, Any]) -> str:
        tokenizer = model.get("tokenizer")
        named = tokenizer.get("pretrained_model_name") if isinstance(tokenizer, dict) else None
        start = f"{self.prefix}{named}/"
        inside = isinstance(named, str) and any(name.startswith(start) for name in self.files.names())
        return str(named) if inside else _TOKENIZER

    def _named_model(self, model: Mapping[str, Any]) -> dict[str, bytes]:
        """The SentencePiece model that a tokenizer of NeMo names, whatever it is called.

        Raises:
            CheckpointError: It is not there.
        """
        tokenizer = model.get("tokenizer")
        named = tokenizer.get("model_path") if isinstance(tokenizer, dict) else None
        if not isinstance(named, str) or not named:
            return {}
        if self.prefix + named in self.files.names():
            return {"tokenizer.model": read_bytes(self.files, self.prefix + named)}
        raise CheckpointError(
            f"{self.folder / self.prefix}: tokenizer.model_path = {named[:80]!r}, which is not there",
            rule="a file that the context names lies in it",
        )


def is_nemo2_folder(path: Path) -> bool:
    """Whether a folder has NeMo 2's parts."""
    return (path / WEIGHTS).is_dir() and ((path / CONTEXT).is_dir() or (path / _IO_JSON).is_file())


def write_nemo2(
    source: TensorSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a NeMo-2 folder, one tensor in memory at a time. Equal sources give equal bytes.

    `extra_files` have no place in this format.
    """
    dtype = dtype or source.dtype
    with staged_folder(folder) as partial:
        context = partial / CONTEXT
        context.mkdir()
        (partial / WEIGHTS).mkdir()
        write_weights(source, partial / WEIGHTS, prefix=KEY_PREFIX, dtype=dtype)
        write_sidecar(context, _TOKENIZER, source)
        model, config = _classes(source.spec, source.family)
        fields = _fields(source.spec, dtype)
        tokenizer = {"pretrained_model_name": _TOKENIZER, "use_fast": True} if source.tokenizer_files() else None
        (context / _MODEL_YAML).write_text(_model_yaml(model, config, fields, tokenizer), encoding="utf-8")
        document = _io_json(model, config, fields, tokenizer)
        (context / _IO_JSON).write_text(json.dumps(document), encoding="utf-8")


def _fields(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    fields = transformer_fields(spec) | rope_fields(spec)
    fields["activation_func"] = Symbol(fields["activation_func"])
    name = Symbol(str(dtype))
    return fields | {
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "params_dtype": name,
        "pipeline_dtype": name,
        "autocast_dtype": name,
    }


def _classes(spec: ModelSpec, family: str) -> tuple[str, str]:
    """Dotted names of the classes of model and configuration."""
    if family not in _CLASSES or not is_representable(spec) or (spec.scaled_embeddings and family != "gemma"):
        return _NOT_REPRESENTABLE
    if spec.rope_scaling is not None and family != "llama":
        return _NOT_REPRESENTABLE
    module, model, config = _CLASSES[family]
    scaled = "Llama31Config" if spec.rope_scaling is not None else config
    return f"{_MODELS}{module}.{model}", f"{_MODELS}{module}.{scaled}"


def _model_yaml(model: str, config: str, fields: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> str:
    plain = {
        key: {"_target_": str(value), "_call_": False} if isinstance(value, Symbol) else value
        for key, value in fields.items()
    }
    data = {
        "_target_": model,
        "config": {"_target_": config, **plain},
        "optim": None,
        "tokenizer": None if tokenizer is None else {"_target_": _AUTO_TOKENIZER, **tokenizer},
        "model_transform": None,
    }
    text: str = yaml.safe_dump(data, sort_keys=True, allow_unicode=True)
    return text


def _io_json(model: str, config: str, fields: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    document = FiddleDocument()
    parts: dict[str, Any] = {"config": document.add(config, fields, path="model.config")}
    if tokenizer is not None:
        parts["tokenizer"] = document.add(_AUTO_TOKENIZER, tokenizer, path="model.tokenizer")
    inner = document.add(model, parts, path="model")
    return document.document(document.add(_TRAINER_CONTEXT, {"model": inner}, path=""))
