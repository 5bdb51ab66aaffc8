"""The torch_dist folder (torch distributed checkpoint, as Megatron-Core lays it out), tensor by tensor.

torch's own writer keeps every tensor of a file until the file is closed, and takes part in collectives; its reader runs
foreign pickles. The format is small: records made by `torch.save`, one after another, and a pickled index of where each
piece of each tensor lies. So we write and read it ourselves, with torch's own index classes.

Equal input gives equal bytes: no time stamps, no random identifiers, no paths.
"""

import json
import pickle
import zipfile
from enum import Enum
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_minitron.checkpoints.files import Files, Window, read_bytes
from nemo_minitron.checkpoints.large_files import open_binary
from nemo_minitron.checkpoints.pickles import TensorHeader, read_metadata, read_tensor_header
from nemo_minitron.checkpoints.tensors import read_tensor
from nemo_minitron.checkpoints.torch_dist_index import Piece, Shape, check_files, stored_tensors
from nemo_minitron.checkpoints.torch_file import ZIP_ERRORS, data_start
from nemo_minitron.errors import CheckpointError

_DATA_FILE = "__0_0.distcp"
_MARKER = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistWriter:
    """Appends tensors to a folder; the index and `metadata.json` (the sign of completeness) are written at the end.

    Args:
        folder: An empty folder.
        nbytes: About how large it will be, if known.
    """

    def __init__(self, folder: Path, *, nbytes: int = 0) -> None:
        self._folder = folder
        self._tensors: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file = open_binary(folder / _DATA_FILE, "wb", nbytes=nbytes)

    def add(self, key: str, tensor: Tensor, *, offsets: Shape | None = None, shape: Shape | None = None) -> None:
        """Append one piece of a tensor.

        `offsets` say where the piece begins in the tensor of that name and `shape`; None for a complete tensor.
        """
        whole = torch.Size(tensor.shape if shape is None else shape)
        at = torch.Size(offsets or (0,) * len(whole))
        entry = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), whole, chunks=[])
        )
        entry.chunks.append(ChunkStorageMetadata(at, tensor.shape))
        start = self._file.tell()
        # torch.save writes the complete storage of a view; a clone has a storage of its own size.
        fits = tensor.untyped_storage().nbytes() == tensor.nbytes
        torch.save(tensor.detach() if fits else tensor.detach().clone(), self._file)
        self._place(MetadataIndex(key, at, len(entry.chunks) - 1), start)

    def add_object(self, key: str, value: Any) -> None:
        """Append a small object in the form Megatron-Core stores one of its sharded objects."""
        self._tensors[key] = BytesStorageMetadata()
        start = self._file.tell()
        torch.save([value], self._file)
        self._place(MetadataIndex(key), start)

    def _place(self, index: MetadataIndex, start: int) -> None:
        self._places[index] = _StorageInfo(_DATA_FILE, start, self._file.tell() - start)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            return
        write_index(self._folder, Metadata(self._tensors, storage_data=self._places))
        torch.save({}, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_MARKER))


def write_index(folder: Path, index: Metadata) -> None:
    """Write `.metadata` so that its bytes do not depend on the version of Python.

    Enumerations are stored as class and value (Python 3.11.0 to 3.11.3 would store a call of `getattr`), and the folder
    that it was written to is left out: Python 3.13 pickles a path under a name that older ones do not have.
    """
    index.storage_meta, index.version = StorageMeta(), CURRENT_DCP_VERSION
    with (folder / ".metadata").open("wb") as file:
        _IndexPickler(file, protocol=4).dump(index)


class _IndexPickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (type(value), (value.value,)) if isinstance(value, Enum) else NotImplemented


class TorchDistReader:
    """Reads boxes of tensors from a torch_dist folder, wherever and however many pieces they are stored in.

    Raises:
        CheckpointError: The folder is incomplete, of another format, damaged, or its index is no plain data.
    """

    def __init__(self, files: Files, folder: str = "") -> None:
        self._files = files
        self._prefix = f"{folder}/" if folder else ""
        self.label = f"{files.label}/{folder}" if folder else files.label
        self._check_marker()
        index = read_metadata(read_bytes(files, self._prefix + ".metadata"), where=f"{self.label}/.metadata")
        self.tensors = stored_tensors(index, label=self.label)
        sizes = {name.removeprefix(self._prefix): files.size(name) for name in files.names()}
        check_files(self.tensors, sizes, label=self.label)

    def shape(self, key: str) -> Shape:
        """Shape of a complete tensor."""
        return self.tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor."""
        return self.tensors[key].dtype

    def read(self, key: str, *, start: Shape | None = None, stop: Shape | None = None) -> Tensor:
        """A box of a tensor, as a tensor of its own.

        `start` has the first index of each dimension (None for 0), `stop` one past the last (None for all).

        Raises:
            CheckpointError: The stored pieces do not cover the box, or cannot be read.
        """
        tensor = self.tensors[key]
        low = start or (0,) * len(tensor.shape)
        high = stop or tensor.shape
        box = tuple(b - a for a, b in zip(low, high, strict=True))
        found: Tensor | None = None
        covered = 0
        for piece in tensor.pieces:
            cut_low = tuple(max(a, o) for a, o in zip(low, piece.offsets, strict=True))
            cut_high = tuple(min(b, o + s) for b, o, s in zip(high, piece.offsets, piece.sizes, strict=True))
            if any(a >= b for a, b in zip(cut_low, cut_high, strict=True)):
                continue
            inner = tuple(slice(a - o, b - o) for a, b, o in zip(cut_low, cut_high, piece.offsets, strict=True))
            part = self._read_piece(key, piece, inner)
            covered += part.numel()
            if tuple(part.shape) == box:
                return part
            found = torch.empty(box, dtype=tensor.dtype) if found is None else found
            found[tuple(slice(a - o, b - o) for a, b, o in zip(cut_low, cut_high, low, strict=True))] = part
        if found is None or covered != found.numel():
            raise CheckpointError(f"{self.label}: pieces of {key} overlap or leave holes", remedy="write it again")
        return found

    def _read_piece(self, key: str, piece: Piece, inner: tuple[slice, ...]) -> Tensor:
        """A box of one stored piece; only the needed rows are read."""
        where = f"{self.label}: {key}"
        with self._files.open(self._prefix + piece.file) as stream:
            header, data_start = _open_record(stream, piece, where)
            if (header.shape, header.dtype) != (piece.sizes, self.tensors[key].dtype):
                raise CheckpointError(f"{where}: stored {header.shape} {header.dtype}, the index says {piece.sizes}")
            rows, rest = inner[0], piece.sizes[1:]
            stream.seek(data_start + (header.offset + rows.start * prod(rest)) * header.dtype.itemsize)
            part = read_tensor(stream, (rows.stop - rows.start, *rest), header.dtype, where=where)
        return part[(slice(None), *inner[1:])].contiguous()

    def _check_marker(self) -> None:
        name = self._prefix + "metadata.json"
        if name not in self._files.names():
            raise CheckpointError(
                f"{self.label}: metadata.json is missing", rule="it is written last, so this checkpoint is not complete"
            )
        try:
            backend = json.loads(read_bytes(self._files, name))["sharded_backend"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.label}: metadata.json is damaged ({error})") from error
        if backend != "torch_dist":
            raise CheckpointError(
                f"{self.label}: stored as {backend!r}",
                rule="torch_dist",
                remedy="load and save it once with the NeMo that wrote it, dist_ckpt_format: torch_dist",
            )


def _open_record(stream: BinaryIO, piece: Piece, where: str) -> tuple[TensorHeader, int]:
    """Header of the tensor that a piece's record holds, and where in the stream its elements' storage begins.

    Raises:
        CheckpointError: It is not a sound, uncompressed `torch.save` archive of one row-major tensor.
    """
    try:
        with zipfile.ZipFile(Window(stream, piece.start, piece.length)) as archive:
            pickled = next(item for item in archive.namelist() if item.endswith("/data.pkl"))
            if archive.getinfo(pickled).compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{where}: its record is compressed", rule="torch.save stores records as they are"
                )
            header = read_tensor_header(archive.read(pickled), where=where)
            record = archive.getinfo(f"{pickled.removesuffix('data.pkl')}data/{header.storage}")
        start = data_start(stream, record, where, base=piece.start)
    except ZIP_ERRORS as error:
        raise CheckpointError(f"{where}: its record is damaged ({error})", remedy="fetch or write it again") from error
    needed = (header.offset + prod(header.shape)) * header.dtype.itemsize
    inside = header.offset >= 0 and record.header_offset + record.file_size <= piece.length
    if record.compress_type != zipfile.ZIP_STORED or record.file_size < needed or not inside:
        raise CheckpointError(f"{where}: its record holds {record.file_size} of {needed} bytes")
    if not header.is_contiguous:
        raise CheckpointError(f"{where}: stored with strides {header.stride}", rule="row-major pieces")
    return header, start
