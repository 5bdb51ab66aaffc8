"""From any checkpoint to any format, tensor by tensor, building no model."""

import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import torch

from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.megatron_dist import is_megatron_folder, write_megatron
from nemo_minitron.checkpoints.nemo1 import CONFIG_FILE, NemoSource, pack_nemo, write_folder
from nemo_minitron.checkpoints.nemo2 import is_nemo2_folder, write_nemo2
from nemo_minitron.checkpoints.source import TensorSource, open_checkpoint
from nemo_minitron.errors import CheckpointError


class Format(StrEnum):
    """What can be written."""

    HF = "hf"
    """A Hugging Face folder."""
    NEMO = "nemo"
    """A NeMo-1 `.nemo` file, or, where the name has no such ending, the same unpacked."""
    NEMO2 = "nemo2"
    """A NeMo-2 folder."""
    MEGATRON = "megatron"
    """A folder for Megatron-LM and Megatron-Bridge."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def format_for(target: Path) -> Format:
    """What a name asks for: `.nemo` at its end, else a Hugging Face folder."""
    return Format.NEMO if target.suffix == ".nemo" else Format.HF


def convert(
    source: Path,
    target: Path,
    *,
    to: Format | None = None,
    dtype: torch.dtype | None = None,
    replace: bool = False,
    card: Callable[[TensorSource, Format], dict[str, bytes]] | None = None,
) -> TensorSource:
    """Write a checkpoint in another format; returns what was written, opened.

    What `target` held before stays whole until the new one is.

    Args:
        source: Anything `open_checkpoint` reads.
        target: Where.
        to: The format; None goes by the name of `target`.
        dtype: Type of the weights; None keeps the source's.
        replace: Whether a checkpoint that is already there may be replaced.
        card: Makes the model card for the Hugging Face folder or the `.nemo` file, by its file name.

    Raises:
        CheckpointError: The source cannot be read; or `target` is there already and is not to be replaced, is no
            checkpoint, or lies inside the source or around it.
        SpecError: The format cannot say this architecture.
    """
    check_target(source, target, replace=replace)
    opened = open_checkpoint(source)
    kind = to or format_for(target)
    extra = card(opened, kind) if card is not None else {}
    match kind:
        case Format.HF:
            write_hf(opened, target, dtype=dtype, extra_files=extra)
        case Format.NEMO2:
            write_nemo2(opened, target, dtype=dtype)
        case Format.MEGATRON:
            write_megatron(opened, target, dtype=dtype)
        case Format.NEMO if target.suffix != ".nemo":
            write_folder(opened, target, dtype=dtype)
        case Format.NEMO if isinstance(opened, NemoSource) and opened.is_native and dtype in (None, opened.dtype):
            pack_nemo(source, target, extra_files=extra)
        case Format.NEMO:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
                write_folder(opened, Path(scratch) / "folder", dtype=dtype)
                pack_nemo(Path(scratch) / "folder", target, extra_files=extra)
    return open_checkpoint(target)


def check_target(source: Path, target: Path, *, replace: bool) -> None:
    """Whether something may be written to `target`.

    Raises:
        CheckpointError: See `convert`.
    """
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(f"{target}: is the source, lies inside it, or around it", remedy="name another place")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not replace:
        raise CheckpointError(f"{target}: is already there", remedy="name another place, or give --force to replace it")
    if not is_checkpoint(target):
        raise CheckpointError(
            f"{target}: is already there and is no checkpoint", rule="--force replaces checkpoints, nothing else"
        )


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like something this package writes, whole or damaged."""
    if path.is_file():
        return path.suffix == ".nemo"
    named = any((path / name).is_file() for name in ("config.json", CONFIG_FILE))
    return named or is_nemo2_folder(path) or is_megatron_folder(path)
