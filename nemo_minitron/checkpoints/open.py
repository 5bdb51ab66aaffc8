"""Opening a checkpoint of whatever format, found out by looking at it."""

import re
from pathlib import Path

from nemo_minitron.checkpoints.gguf import open_gguf
from nemo_minitron.checkpoints.hf import open_hf
from nemo_minitron.checkpoints.megatron_dist import is_megatron_folder, open_megatron
from nemo_minitron.checkpoints.nemo1 import open_nemo
from nemo_minitron.checkpoints.nemo2 import is_nemo2_folder, open_nemo2
from nemo_minitron.checkpoints.source import Checkpoint
from nemo_minitron.errors import CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""`organisation/name`; a path of two parts looks the same."""
_FILES = (".nemo", ".gguf", ".safetensors")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any readable format, found out by looking at it.

    That is a Hugging Face folder, a `.gguf` file, a `.nemo` file or its unpacked folder, a NeMo-2 folder, or a
    checkpoint folder of Megatron-LM or Megatron-Bridge.

    Raises:
        CheckpointError: The path does not exist, is of no known format, or is damaged.
        SpecError: It holds an architecture that is not supported.
    """
    if path.is_dir():
        if (path / "model_config.yaml").is_file():
            return open_nemo(path)
        if (path / "config.json").is_file():
            return open_hf(path)
        if is_nemo2_folder(path):
            return open_nemo2(path)
        if is_megatron_folder(path):
            return open_megatron(path)
        raise CheckpointError(
            f"{path}: not a checkpoint folder",
            rule="config.json (Hugging Face), model_config.yaml (unpacked .nemo), context/ and weights/ (NeMo 2), or "
            "iterations of Megatron lie in it",
            remedy="name the folder that holds the weights themselves",
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder", remedy=hub_remedy(str(path)) or "check the path")
    if _starts_with(path, b"GGUF"):
        return open_gguf(path)
    if path.suffix == ".nemo" or _starts_with(path, b"ustar", offset=257):
        return open_nemo(path)
    raise CheckpointError(
        f"{path}: not a checkpoint file", rule="a .gguf or .nemo file; for Hugging Face models name the folder"
    )


def hub_remedy(path: str) -> str:
    """What to do about a path that is not there but reads like a name on the Hugging Face hub; else empty."""
    if HUB_NAME.fullmatch(path) is None or Path(path).suffix in _FILES or Path(path).parent.is_dir():
        return ""
    return (
        f"a model on the Hugging Face hub has to be downloaded first: hf download {path} --local-dir DIR; then name DIR"
    )


def _starts_with(path: Path, magic: bytes, *, offset: int = 0) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(len(magic)) == magic
