"""Which checkpoint this is: a digest that is cheap, and another one for other weights."""

import hashlib
from pathlib import Path

_WEIGHTS = (".distcp", ".safetensors", ".bin", ".gguf", ".nemo", ".pt", ".ckpt")
_BLOCKS, _BLOCK = 256, 4096
"""How many blocks of each file are read, at even distances, and their bytes; a smaller file is read in full."""


def weights_digest(path: Path) -> str:
    """SHA-256 over names, sizes and parts of the files that hold weights; the same wherever the checkpoint lies.

    A megabyte of each file is read. Other weights of the same sizes differ nearly everywhere, also where only some
    layers are others.

    Raises:
        OSError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        size = file.stat().st_size
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _BLOCKS * _BLOCK:
                digest.update(stream.read())
                continue
            for index in range(_BLOCKS):
                stream.seek((size - _BLOCK) * index // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in found if file.suffix in _WEIGHTS] or found
