"""From any checkpoint to any format, tensor by tensor, building no model."""

from collections.abc import Callable
from pathlib import Path

import torch

from nemo_minitron.checkpoints.formats import FORMATS, format_for
from nemo_minitron.checkpoints.megatron_dist import is_megatron_folder
from nemo_minitron.checkpoints.nemo1 import CONFIG_FILE
from nemo_minitron.checkpoints.nemo2 import is_nemo2_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import Checkpoint
from nemo_minitron.errors import CheckpointError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: Path,
    target: Path,
    *,
    to: str | None = None,
    dtype: torch.dtype | None = None,
    replace: bool = False,
    card: Callable[[Checkpoint, str], dict[str, bytes]] | None = None,
) -> Checkpoint:
    """Write a checkpoint in another format; returns what was written, opened.

    What `target` held before stays complete until the new one is.

    `to` is a key of `FORMATS`; None goes by the name of `target`. A dtype of None keeps the source's. `card` makes
    the model card for the Hugging Face folder or the `.nemo` file, by its file name.

    Raises:
        CheckpointError: The source cannot be read; or `target` is there already and is not to be replaced, is no
            checkpoint, or lies inside the source or around it.
        SpecError: The format cannot say this architecture.
        MinitronError: The name of `target` asks for a format that is not written.
    """
    check_target(source, target, replace=replace)
    kind = to or format_for(target)
    opened = open_checkpoint(source)
    extra = card(opened, kind) if card is not None else {}
    FORMATS[kind].write(opened, target, dtype=dtype, extra_files=extra)
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
    """Whether a path looks like something this package writes, complete or damaged."""
    if path.is_file():
        return path.suffix == ".nemo"
    named = any((path / name).is_file() for name in ("config.json", CONFIG_FILE))
    return named or is_nemo2_folder(path) or is_megatron_folder(path)
