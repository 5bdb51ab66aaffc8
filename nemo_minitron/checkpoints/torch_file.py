"""Files made by `torch.save` (`.bin`, `.ckpt`, `.pt`), read tensor by tensor where they lie.

Such a file is a zip archive without compression: `NAME/data.pkl`, a pickle that describes the tensors, and one record
`NAME/data/KEY` of bytes for each storage. The pickle is read by a restricted unpickler; `torch.load` is never called.
"""

import struct
import zipfile
import zlib
from math import prod
from typing import Any, BinaryIO

from torch import Tensor

from nemo_minitron.checkpoints.files import Files
from nemo_minitron.checkpoints.pickles import TensorHeader, read_common, read_state
from nemo_minitron.checkpoints.tensors import read_tensor
from nemo_minitron.errors import CheckpointError

LARGEST_PICKLE = 256_000_000
"""Bytes of the description; a hundred a tensor are usual."""
_LOCAL_HEADER = struct.Struct("<26xHH")

ZIP_ERRORS = (
    *(zipfile.BadZipFile, struct.error, KeyError, OSError, EOFError, ValueError, NotImplementedError, RuntimeError),
    *(OverflowError, IndexError, StopIteration, zlib.error),
)
"""What Python's zip reader raises on damaged archives, beside its own error."""


class TorchFile:
    """A state dict on disk. `entries` holds type, shape and place of each tensor.

    Raises:
        CheckpointError: It is damaged, of the format before torch 1.6, compressed, asks for code, or a tensor reaches
            beyond its record.
    """

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name
        self.label = f"{files.label}/{name}"
        with files.open(name) as stream:
            self._folder, data, self._records = _open_archive(stream, files.size(name), self.label)
        self.entries: dict[str, TensorHeader] = read_state(data, where=self.label)
        for key, header in self.entries.items():
            _check_header(header, self._records.get(f"{self._folder}data/{header.storage}"), f"{self.label}: {key}")

    def get(self, name: str) -> Tensor:
        """One tensor, contiguous; only its own stretch of the storage is read.

        Raises:
            KeyError: There is none of that name.
            CheckpointError: The file has shrunk since it was opened.
        """
        header = self.entries[name]
        where = f"{self.label}: {name}"
        record = self._records[f"{self._folder}data/{header.storage}"]
        with self._files.open(self._name) as stream:
            start = data_start(stream, record, where)
            stream.seek(start + header.offset * header.dtype.itemsize)
            flat = read_tensor(stream, (_span(header),), header.dtype, where=where)
        if header.is_contiguous:
            return flat.reshape(header.shape)
        return flat.as_strided(header.shape, header.stride).contiguous()


def read_common_file(files: Files, name: str) -> dict[str, Any]:
    """`common.pt` of a distributed checkpoint as plain data.

    Raises:
        CheckpointError: It is damaged or asks for code.
    """
    label = f"{files.label}/{name}"
    with files.open(name) as stream:
        _, data, _ = _open_archive(stream, files.size(name), label)
    return read_common(data, where=label)


def _open_archive(stream: BinaryIO, size: int, label: str) -> tuple[str, bytes, dict[str, zipfile.ZipInfo]]:
    """Folder inside the archive, its description, and its records."""
    if stream.read(2) != b"PK":
        raise CheckpointError(
            f"{label}: not a file that torch.save writes since torch 1.6",
            remedy="load it once in the torch that wrote it and save it again, or fetch it again if it is damaged",
        )
    try:
        stream.seek(0)
        with zipfile.ZipFile(stream) as archive:
            records = {item.filename: item for item in archive.infolist()}
            pickled = [name for name in records if name.endswith("data.pkl") and name.count("/") == 1]
            if len(pickled) != 1 or len(records) != len(archive.infolist()):
                raise CheckpointError(f"{label}: not a file of torch.save (no single data.pkl, or a name twice)")
            for item in records.values():
                if item.compress_type != zipfile.ZIP_STORED or item.file_size > size:
                    raise CheckpointError(
                        f"{label}: {item.filename} is compressed, {item.file_size} from {item.compress_size} bytes",
                        rule="torch.save stores records as they are",
                    )
            if records[pickled[0]].file_size > LARGEST_PICKLE:
                raise CheckpointError(f"{label}: a description of {records[pickled[0]].file_size} bytes")
            folder = pickled[0].removesuffix("data.pkl")
            order = records.get(f"{folder}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise CheckpointError(f"{label}: numbers are stored big-endian", rule="little-endian")
            return folder, archive.read(pickled[0]), records
    except ZIP_ERRORS as error:
        raise CheckpointError(
            f"{label}: damaged ({type(error).__name__}: {error})", remedy="truncated? fetch it again"
        ) from error


def _check_header(header: TensorHeader, record: zipfile.ZipInfo | None, where: str) -> None:
    numbers = (header.offset, *header.shape, *header.stride)
    plain = len(header.shape) == len(header.stride) and all(type(value) is int and value >= 0 for value in numbers)
    if not plain or record is None or not all(header.shape):
        raise CheckpointError(f"{where}: a damaged tensor, shaped {header.shape}")
    needed = (header.offset + _span(header)) * header.dtype.itemsize
    if needed > record.file_size or prod(header.shape) > _span(header):
        raise CheckpointError(
            f"{where}: shaped {header.shape}, strides {header.stride}: {record.file_size} of {needed} bytes are stored",
            rule="every element of a tensor has its own bytes",
        )


def _span(header: TensorHeader) -> int:
    """Elements of the storage from a tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(header.shape, header.stride, strict=True))


def data_start(stream: BinaryIO, record: zipfile.ZipInfo, where: str, *, base: int = 0) -> int:
    """Where in a stream a record's bytes begin; `base` is where its archive does.

    Raises:
        CheckpointError: It has no header.
    """
    stream.seek(base + record.header_offset)
    head = stream.read(_LOCAL_HEADER.size)
    if len(head) < _LOCAL_HEADER.size or head[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{where}: its record is damaged", remedy="fetch it again")
    name_length, extra_length = _LOCAL_HEADER.unpack(head)
    return base + record.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)
