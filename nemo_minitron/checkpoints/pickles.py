"""Reading pickles of strangers without running them.

A torch_dist folder keeps its index (`.metadata`) and each tensor's header as pickles. An ordinary unpickler would call
whatever they name. These two know a short list of names, each harmless, and refuse the rest.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.serialization import _get_layout

from nemo_minitron.errors import CheckpointError


class _MegatronMetadata(dcp_metadata.Metadata):
    """Stands in for Megatron-Core's subclass, which adds one attribute that we do not need."""


@dataclass
class _Inert:
    """Stands in for classes whose content is of no use to us."""


_DCP = "torch.distributed.checkpoint."
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"

METADATA_NAMES: dict[tuple[str, str], Any] = {
    **{
        (_DCP + "metadata", name): getattr(dcp_metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    **{
        (_DCP + "planner", name): getattr(dcp_planner, name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
    (_DCP + "filesystem", "_StorageInfo"): _StorageInfo,
    (_DCP + "filesystem", "_StoragePrefix"): _StoragePrefix,
    (_MEGATRON, "MCoreMetadata"): _MegatronMetadata,
    (_MEGATRON, "MCoreSavePlan"): _Inert,
    ("collections", "OrderedDict"): OrderedDict,
    # A path is rebuilt without being touched, and as text only, on every system.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PurePosixPath,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
}


@dataclass(frozen=True)
class TensorHeader:
    """How a tensor lies in its storage record."""

    storage: str
    """Key of the record: `data/KEY` in the archive."""
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Row-major without holes."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


def _tensor_header(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> TensorHeader:
    return TensorHeader(storage.key, storage.dtype, offset, tuple(size), tuple(stride))


_STORAGE_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

TENSOR_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_header,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, names: dict[tuple[str, str], Any], where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        self._refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            return _Storage(str(pid[2]), pid[1])
        self._refuse("an object outside the archive")

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._where}: refused, its pickle asks for {what}",
            rule="a checkpoint's index holds plain data about tensors",
            remedy="do not use this file unless you trust whoever made it; convert it with the tool that wrote it",
        )


def _unpickle(data: bytes, names: dict[tuple[str, str], Any], where: str) -> Any:
    load: Callable[[], Any] = _Unpickler(data, names, where).load
    try:
        return load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(f"{where}: damaged ({type(error).__name__}: {error})", remedy="fetch it again") from error


def read_metadata(data: bytes, *, where: str) -> dcp_metadata.Metadata:
    """The index of a torch_dist folder.

    Raises:
        CheckpointError: It is damaged, or names anything beyond a list of plain data types.
    """
    found = _unpickle(data, METADATA_NAMES, where)
    if isinstance(found, dcp_metadata.Metadata):
        tensors, places = getattr(found, "state_dict_metadata", None), getattr(found, "storage_data", None)
        if isinstance(tensors, dict) and isinstance(places, dict):
            return found
    raise CheckpointError(f"{where}: not the index of a torch_dist checkpoint")


def read_tensor_header(data: bytes, *, where: str) -> TensorHeader:
    """The header of one saved tensor.

    Raises:
        CheckpointError: It is damaged, not a tensor, or names anything else.
    """
    found = _unpickle(data, TENSOR_NAMES, where)
    if not isinstance(found, TensorHeader) or not isinstance(found.dtype, torch.dtype):
        raise CheckpointError(f"{where}: not a tensor")
    return found
