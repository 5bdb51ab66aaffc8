"""`nemo-minitron convert` and `inspect`: checkpoints without a recipe and without a model being built."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from nemo_minitron.cli.failures import reported

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Hugging Face, .nemo or its folder, NeMo 2, Megatron-LM or Bridge, or GGUF; found out by looking.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder, or a .nemo file.")],
    *,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FORMAT", help="hf, nemo, nemo2 or megatron. (default: by the name DST)"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, bf16 or fp16, or torch's names. (default: as the source)")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint in another format, tensor by tensor."""
    with reported(debug=debug):
        from nemo_minitron.checkpoints.convert import DTYPES
        from nemo_minitron.checkpoints.convert import convert as write
        from nemo_minitron.checkpoints.formats import FORMATS, format_for
        from nemo_minitron.checkpoints.open import open_checkpoint
        from nemo_minitron.checkpoints.source import TensorSource
        from nemo_minitron.config.dtypes import dtype_name
        from nemo_minitron.errors import MinitronError
        from nemo_minitron.report.model_card import CARD, model_card

        if to is not None and to not in FORMATS:
            raise MinitronError(f"--to {to}", rule=f"one of {', '.join(FORMATS)}")
        wanted = None if dtype is None else DTYPES.get(dtype_name(dtype) or "")
        if dtype is not None and wanted is None:
            raise MinitronError(f"--dtype {dtype}", rule="fp32, bf16 or fp16, also by torch's names")
        kind = to or format_for(destination)

        def card(opened: TensorSource, into: str) -> dict[str, bytes]:
            file = destination.name
            stem, archive = file.removesuffix(".nemo"), file if file.endswith(".nemo") else ""
            text = model_card(opened, name=stem, library=FORMATS[into].library, archive=archive)
            return {CARD: text.encode()}

        write(source, destination, to=kind, dtype=wanted, replace=force, card=card)
        for note in open_checkpoint(source).notes():
            print(f"note: {note}", file=sys.stderr)
        print(destination)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Any checkpoint that can be read.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Digest the weights too, which reads them all.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is: format, family, sizes, tokenizer, where it comes from, digests."""
    with reported(debug=debug):
        import json

        from nemo_minitron.checkpoints.digest import weights_digest
        from nemo_minitron.checkpoints.open import open_checkpoint
        from nemo_minitron.checkpoints.summary import lines, summary

        source = open_checkpoint(path)
        data = summary(source, path)
        if weights:
            data["digests"]["weights"] = weights_digest(source)
        print(json.dumps(data, indent=2) if as_json else "\n".join(lines(data)))
