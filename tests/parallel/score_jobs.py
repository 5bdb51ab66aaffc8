"""What ranks do in the tests of the score stage: run it complete, in parts, or until it is killed."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.jobs import config_for


def score_stage(folder: Path, out: Path, how: dict[str, Any], *, kill: int = 0, stop: int = 0) -> dict[str, Any]:
    """Run the stage in `out`, in which an earlier attempt may have left something; returns its result.

    Args:
        folder: What `jobs.prepare` made.
        out: The stage's folder.
        how: Changes of the recipe's `score`.
        kill: End all ranks by SIGKILL after this many batches; 0 never.
        stop: Ask for a stop, as a signal does, after this many batches.
    """
    from nemo_minitron.callbacks import importance
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.data import read_info
    from nemo_minitron.stages.base import Stage, StageContext
    from nemo_minitron.stages.processes import environment_rank
    from nemo_minitron.stages.score import run

    config = config_for(folder / "hf", folder / "corpus", score=BASE | how)
    out.mkdir(exist_ok=True)
    batches = 0
    before = importance.ImportanceCallback.on_validation_batch_end

    def counted(self: Any, *args: Any) -> None:
        nonlocal batches
        batches += 1
        before(self, *args)
        if kill and batches == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    importance.ImportanceCallback.on_validation_batch_end = counted
    rank, size = environment_rank()
    stage = Stage(name="score", run=run, inputs={"model": "teacher", "data": "data"})
    made = SimpleNamespace(stage=lambda name: folder / name, result=lambda name: read_info(folder / name))

    class Stopped(BaseException):
        pass

    def leave() -> None:
        raise Stopped

    # Only the last rank is told, as when a scheduler's signal reaches one process.
    def told() -> bool:
        return bool(stop) and batches >= stop and rank == size - 1

    runtime.start(config.parallel, seed=config.seed)
    context = StageContext(
        config=config, run=made, out=out, stage=stage, rank=rank, world_size=size, stop_requested=told, stop=leave
    )
    try:
        return run(context) | {"batches": batches}
    except Stopped:
        return {"stopped": batches}
    finally:
        importance.ImportanceCallback.on_validation_batch_end = before
        runtime.stop()


BASE = {"samples": 11, "sequence_length": 64, "micro_batch_size": 1, "checkpoint_every": 3}


def score_all(folder: Path, runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [score_stage(folder, out, how) for out, how in runs]


def stop_and_go_on(folder: Path, out: Path, batches: int) -> list[dict[str, Any]]:
    return [score_stage(folder, out, {}, stop=batches), score_stage(folder, out, {})]


def killed(folder: Path, out: Path, batches: int) -> None:
    score_stage(folder, out, {}, kill=batches)
