"""Reading untrusted pickles without running them.

A torch_dist folder keeps its index (`.metadata`) and each tensor's header as pickles; a `.bin` or `.ckpt` file is one,
and so is `common.pt`. An ordinary unpickler would call whatever they name. This one knows short lists of names, each
harmless, and refuses the rest. Names that lead into Megatron and the like, where arguments of a training are kept,
become inert objects: nothing of those packages is imported.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any, ClassVar, NoReturn, cast

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


_MAX_DEPTH = 20
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


class _Record:
    """Stands in for `argparse.Namespace`: attributes, nothing else."""


class _Nothing:
    """Stands in for an object of a foreign class; takes whatever it is given and keeps none of it."""

    path = ""

    def __new__(cls, *_: Any, **__: Any) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def append(self, value: Any) -> None:
        """Forget it."""

    def extend(self, values: Any) -> None:
        """Forget them."""


def _latin_bytes(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 spells bytes."""
    return text.encode("latin1")


# State dicts of complete models: tensors, and the byte streams that Transformer Engine keeps beside them.
STATE_NAMES: dict[tuple[str, str], Any] = {
    **TENSOR_NAMES,
    ("torch", "Size"): torch.Size,
    ("_io", "BytesIO"): _Nothing,
    ("_codecs", "encode"): _latin_bytes,
}

COMMON_NAMES: dict[tuple[str, str], Any] = {
    **STATE_NAMES,
    ("argparse", "Namespace"): _Record,
    **{("builtins", name): kind for name, kind in {"set": set, "frozenset": frozenset, "slice": slice}.items()},
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("torch", "device"): _Nothing,
    ("torch._C", "Generator"): _Nothing,
}
# What a training keeps of these is a name at most: enumerations, functions, recipes of precision.
_INERT = (
    *("megatron.core.", "megatron.training.", "megatron.bridge.", "megatron.legacy.", "megatron.energon."),
    *("transformer_engine.", "nemo.", "torch.nn.functional", "torch.nn.init", "numpy.core.multiarray", "numpy.dtypes"),
)


_GETATTR = (("builtins", "getattr"), ("__builtin__", "getattr"))
"""Its names since protocol 3 and before."""


class _Unpickler(pickle._Unpickler):
    """The interpreter in Python.

    The one in C cannot be kept from writing attributes onto a class (opcode BUILD), nor from reserving memory for a
    memo of any size.
    """

    def __init__(self, data: bytes, names: dict[tuple[str, str], Any], where: str, inert: tuple[str, ...] = ()) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names
        self._where = where
        self._inert = inert

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        if (module, name) in _GETATTR:
            return self._attribute
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if self._inert and f"{module}.".startswith(self._inert) and "." not in name:
            return type(name, (_Nothing,), {"path": f"{module}.{name}"})
        self._refuse(f"{module}.{name}")

    def _attribute(self, owner: Any, name: Any) -> Any:
        """What `getattr` may be asked for: a member of an enumeration that is allowed, or a name inside an inert class.

        Python 3.11.0 to 3.11.3 pickle a member so, and protocols below 4 a nested class.
        """
        if isinstance(owner, type) and isinstance(name, str) and name.isidentifier():
            if issubclass(owner, Enum) and name in owner.__members__:
                return owner[name]
            if issubclass(owner, _Nothing) and not name.startswith("_"):
                return type(name, (_Nothing,), {"path": f"{owner.path}.{name}"})
        self._refuse(f"builtins.getattr({getattr(owner, '__name__', type(owner).__name__)}, {str(name)[:40]!r})")

    def _build(self) -> None:
        if callable(self.stack[-2]):  # type: ignore[attr-defined]
            self._refuse("attributes on a class or function")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}

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


def _unpickle(data: bytes, names: dict[tuple[str, str], Any], where: str, inert: tuple[str, ...] = ()) -> Any:
    load: Callable[[], Any] = _Unpickler(data, names, where, inert).load
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


def read_state(data: bytes, *, where: str) -> dict[str, TensorHeader]:
    """Headers of the tensors of a pickled state dict, `{name: tensor}` or `{"state_dict": {name: tensor}}`.

    Raises:
        CheckpointError: It is damaged, asks for code, or holds anything but tensors under names, save for the state
            that Transformer Engine keeps (`..._extra_state`).
    """
    found = _unpickle(data, STATE_NAMES, where)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where}: not a state dict")
    kept: dict[str, TensorHeader] = {}
    for name, value in found.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue
        if not isinstance(name, str) or not isinstance(value, TensorHeader) or not isinstance(value.dtype, torch.dtype):
            raise CheckpointError(
                f"{where}: {str(name)[:80]!r} is no tensor", rule="a state dict: a tensor under each name"
            )
        kept[name] = value
    return kept


def read_common(data: bytes, *, where: str) -> dict[str, Any]:
    """What Megatron keeps beside the weights (`common.pt`), as plain data; the arguments of a training under `args`.

    Raises:
        CheckpointError: It is damaged, not a dict, or asks for code outside Megatron's own names.
    """
    found = _plain(_unpickle(data, COMMON_NAMES, where, _INERT), depth=0, where=where)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: not a dict")
    return cast("dict[str, Any]", found)


def _plain(value: Any, *, depth: int, where: str) -> Any:
    """Stand-ins to plain data: attributes to a dict, a class or function to its name, anything else to None."""
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{where}: nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, _Record):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth=depth + 1, where=where) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth=depth + 1, where=where) for item in value]
    if isinstance(value, type) and issubclass(value, _Nothing):
        return value.path
    if isinstance(value, torch.dtype | PurePosixPath):
        return str(value)
    return value if isinstance(value, str | int | float | bool) else None
