"""Distributed checkpoints in zarr form, as NeMo r1.2x wrote them: a folder a tensor, a file a chunk.

    <key>/.zarray        JSON: shape, chunks, dtype, compressor, ...   (zarr format 2)
    <key>/0.3.0          one chunk, row-major; those at the edges are padded to the full size

Megatron wrote chunks as they are, and those need no further package. Compressed ones may need `numcodecs` (it comes
with the extra `zarr`).
"""

import io
import zlib
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.files import Files, read_bytes
from nemo_minitron.checkpoints.plain_data import read_json
from nemo_minitron.checkpoints.tensors import read_tensor
from nemo_minitron.checkpoints.torch_dist_index import Shape, StoredTensor
from nemo_minitron.errors import CheckpointError

_HEADER = "/.zarray"
_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "bfloat16": torch.bfloat16}
_CODECS = ("zlib", "gzip", "blosc", "zstd", "lz4")
"""Those that only decompress, into no more than a given size; zarr knows others, among them one that unpickles."""
_ZLIB = ("zlib", "gzip")
_LARGEST_CHUNK = 2**34


class ZarrStore:
    """Reads boxes of tensors from a zarr checkpoint.

    Raises:
        CheckpointError: A header is damaged or of an unknown kind, or a chunk is missing or of the wrong size.
    """

    kind = "zarr"

    def __init__(self, files: Files, folder: str) -> None:
        self._files, self._prefix = files, f"{folder}/" if folder else ""
        self.label = f"{files.label}/{folder}" if folder else files.label
        self._headers: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, StoredTensor] = {}
        names = set(files.names())
        for name in sorted(names):
            if name.startswith(self._prefix) and name.endswith(_HEADER):
                key = name.removeprefix(self._prefix).removesuffix(_HEADER)
                self._add(key, names)
        if not self.tensors:
            raise CheckpointError(f"{self.label}: holds no tensors", rule="a folder with .zarray for each")

    def read(self, key: str, *, start: Shape | None = None, stop: Shape | None = None) -> Tensor:
        """A box of a tensor, as a tensor of its own; only the chunks that it touches are read.

        Raises:
            CheckpointError: A chunk cannot be read.
        """
        tensor, chunks = self.tensors[key], self._headers[key]["chunks"]
        low = start or (0,) * len(tensor.shape)
        high = stop or tensor.shape
        found = torch.empty(tuple(b - a for a, b in zip(low, high, strict=True)), dtype=tensor.dtype)
        spans = [range(a // size, -(-b // size)) for a, b, size in zip(low, high, chunks, strict=True)]
        for place in product(*spans):
            begin = tuple(index * size for index, size in zip(place, chunks, strict=True))
            cut_low = tuple(max(a, o) for a, o in zip(low, begin, strict=True))
            cut_high = tuple(min(b, o + s) for b, o, s in zip(high, begin, chunks, strict=True))
            inner = tuple(slice(a - o, b - o) for a, b, o in zip(cut_low, cut_high, begin, strict=True))
            outer = tuple(slice(a - o, b - o) for a, b, o in zip(cut_low, cut_high, low, strict=True))
            found[outer] = self._chunk(key, place)[inner]
        return found

    def _chunk(self, key: str, place: tuple[int, ...]) -> Tensor:
        header = self._headers[key]
        shape, dtype = tuple(header["chunks"]), self.tensors[key].dtype
        name = self._chunk_name(key, place)
        where = f"{self._files.label}/{name}"
        if header["compressor"] is None:
            with self._files.open(name) as stream:
                return read_tensor(stream, shape, dtype, where=where)
        data = _decompress(read_bytes(self._files, name), header["compressor"], prod(shape) * dtype.itemsize, where)
        return read_tensor(io.BytesIO(data), shape, dtype, where=where)

    def _chunk_name(self, key: str, place: tuple[int, ...]) -> str:
        separator = self._headers[key].get("dimension_separator", ".")
        return f"{self._prefix}{key}/{separator.join(str(index) for index in place)}"

    def _add(self, key: str, names: set[str]) -> None:
        where = f"{self.label}/{key}{_HEADER}"
        header = read_json(read_bytes(self._files, f"{self._prefix}{key}{_HEADER}"), where=where)
        shape, chunks = _sizes(header.get("shape")), _sizes(header.get("chunks"))
        if not shape or len(shape) != len(chunks):
            raise CheckpointError(
                f"{where}: shape {str(header.get('shape'))[:80]}, chunks {str(header.get('chunks'))[:80]}",
                rule="whole numbers, one per dimension",
            )
        if header.get("zarr_format") != 2 or header.get("order") != "C" or header.get("filters"):
            raise CheckpointError(f"{where}: not a plain array", rule="zarr_format 2, order C, no filters")
        if header.get("dtype") not in _DTYPES or header.get("dimension_separator", ".") not in (".", "/"):
            raise CheckpointError(f"{where}: type {header.get('dtype')}", rule=f"one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[header["dtype"]]
        nbytes = prod(chunks) * dtype.itemsize
        count = prod(-(-whole // size) for whole, size in zip(shape, chunks, strict=True))
        if nbytes > _LARGEST_CHUNK or count > len(names):
            raise CheckpointError(
                f"{where}: {count} chunk(s) of {nbytes} bytes", rule="each chunk is a file that is there"
            )
        _check_codec(header.setdefault("compressor", None), where)
        self._headers[key] = header
        for place in product(*(range(-(-whole // size)) for whole, size in zip(shape, chunks, strict=True))):
            name = self._chunk_name(key, place)
            if name not in names:
                raise CheckpointError(f"{self.label}: {name} is missing", rule=f"it holds a piece of {key}")
            if header["compressor"] is None and self._files.size(name) != nbytes:
                raise CheckpointError(f"{self.label}: {name} has {self._files.size(name)} of {nbytes} bytes")
        self.tensors[key] = StoredTensor(shape, dtype, ())


def _sizes(values: Any) -> tuple[int, ...]:
    """Positive whole numbers, or () for anything else."""
    fits = isinstance(values, list) and all(type(value) is int and value > 0 for value in values)
    return tuple(values) if fits else ()


def _check_codec(codec: Any, where: str) -> None:
    if codec is not None and (not isinstance(codec, dict) or codec.get("id") not in _CODECS):
        raise CheckpointError(
            f"{where}: compressor {str(codec)[:80]} is not supported", rule=f"one of {', '.join(_CODECS)}"
        )


def _decompress(data: bytes, codec: dict[str, Any], size: int, where: str) -> bytes:
    """Exactly `size` bytes; what would expand beyond them is an error, not memory."""
    found = _inflate(data, size, where) if codec["id"] in _ZLIB else _decode(data, codec, size, where)
    if len(found) != size:
        raise CheckpointError(f"{where}: {len(found)} of {size} bytes", remedy="fetch it again")
    return found


def _inflate(data: bytes, size: int, where: str) -> bytes:
    try:
        return zlib.decompressobj(wbits=32 + zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise CheckpointError(f"{where}: cannot be decompressed ({error})", remedy="fetch it again") from error


def _decode(data: bytes, codec: dict[str, Any], size: int, where: str) -> bytes:
    try:
        import numcodecs
    except ImportError as error:
        raise CheckpointError(
            f"{where}: compressed with {codec['id']}, which needs the package numcodecs",
            remedy="pip install -e '.[zarr]' in the source tree",
        ) from error
    try:
        out = bytearray(size)
        found = numcodecs.get_codec(codec).decode(data, out)
        return bytes(memoryview(found).cast("B"))
    except Exception as error:  # codecs raise whatever their C libraries say
        raise CheckpointError(f"{where}: cannot be decompressed ({error})", remedy="fetch it again") from error
