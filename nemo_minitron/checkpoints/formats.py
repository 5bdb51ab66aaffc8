"""The table of formats that can be written. A new one is a row here and, for recipes, a member of `ExportFormat`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from nemo_minitron.arch.families import family_named
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.megatron_dist import write_megatron
from nemo_minitron.checkpoints.nemo1 import write_nemo
from nemo_minitron.checkpoints.nemo2 import write_nemo2
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.errors import MinitronError


class Write(Protocol):
    """Writes a checkpoint; what the target held before stays until the new one is complete."""

    def __call__(  # noqa: D102
        self,
        source: TensorSource,
        target: Path,
        /,
        *,
        dtype: torch.dtype | None = None,
        extra_files: Mapping[str, bytes] | None = None,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format that can be written.

    Attributes:
        suffix: What follows a model's name in the name of a file or folder.
        library: The library that a model card names.
        write: Writes it; `extra_files` (a model card) have a place in some formats only.
        check: Raises SpecError where it cannot hold an architecture of a family.
    """

    suffix: str
    library: str
    write: Write
    check: Callable[[ModelSpec, str], object] = lambda spec, family: None


FORMATS: dict[str, Format] = {
    "nemo": Format(suffix=".nemo", library="nemo", write=write_nemo),
    "hf": Format(
        suffix="_hf",
        library="transformers",
        write=write_hf,
        check=lambda spec, family: family_named(family).write_config(spec),
    ),
    "nemo2": Format(suffix="_nemo2", library="nemo", write=write_nemo2),
    "megatron": Format(suffix="_megatron", library="megatron", write=write_megatron),
}
"""By the name that recipes and the command line use: a `.nemo` file, or unpacked where the target has no such ending; a
Hugging Face folder; a NeMo-2 folder; a folder for Megatron-LM and Megatron-Bridge."""


def format_for(target: Path) -> str:
    """What a name asks for: `.nemo` at its end, else a Hugging Face folder.

    Raises:
        MinitronError: It asks for a format that is not written.
    """
    if target.suffix == ".gguf":
        raise MinitronError(
            f"{target}: GGUF files are read, not written",
            rule=f"one of {', '.join(FORMATS)}",
            remedy="write a Hugging Face folder, from which llama.cpp makes one",
        )
    return "nemo" if target.suffix == ".nemo" else "hf"
