"""Complete chains in this process, for tests that look inside a training stage or end it at odd moments."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.jobs import config_for


def run_to(
    run: Path, inputs: Path, last: str | None = None, *, before: Callable[[], None] | None = None, **changes: Any
):
    """Run the chain of the tiny recipe up to a stage; returns the folder's results by stage.

    Args:
        run: The run folder.
        inputs: Folder with `hf/` and `corpus/`.
        last: Stage to stop after.
        before: Called first on each rank, to put something in the way.
        changes: Sections of the recipe, merged into `config_for`'s.
    """
    from nemo_minitron.callbacks.reporter import Reporter
    from nemo_minitron.cli import quiet
    from nemo_minitron.megatron import runtime
    from nemo_minitron.stages.chain import chain_for
    from nemo_minitron.stages.engine import Request, join_processes, run_chain
    from nemo_minitron.stages.run_folder import RunFolder

    quiet.install()
    if before is not None:
        before()
    config = merged(inputs, **changes)
    folder = RunFolder(run)
    processes = join_processes(config, folder)
    try:
        chain = chain_for(config)
        request = Request(config=config, run=folder, last=last)
        run_chain(
            chain,
            request,
            processes=processes,
            reporter=Reporter(silent=processes.rank > 0, stream=io.StringIO(), terminal=False),
        )
        return {stage.name: folder.result(stage.name) for stage in chain if folder.is_complete(stage.name)}
    finally:
        runtime.stop()


def merged(inputs: Path, **changes: Any):
    """The tiny recipe with sections merged, not replaced."""
    plain = config_for(inputs / "hf", inputs / "corpus").model_dump(mode="json")
    sections = {
        name: {**plain[name], **value} if isinstance(value, dict) and isinstance(plain.get(name), dict) else value
        for name, value in changes.items()
    }
    return config_for(inputs / "hf", inputs / "corpus", **sections)


def weights(run: Path, stage: str = "distill", folder: str = "student") -> dict[str, Any]:
    """The tensors that a stage has left."""
    from nemo_minitron.checkpoints.open import open_checkpoint
    from nemo_minitron.checkpoints.source import stream

    return dict(stream(open_checkpoint(run / "stages" / stage / folder)))
