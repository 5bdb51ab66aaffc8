"""Runs a recipe's complete chain in a process of its own, for the checks that need one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import ROOT


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a run came to.

    Attributes:
        summary: Its `summary.json`.
        seconds: How long it took, its start included.
    """

    summary: dict[str, Any]
    seconds: float

    @property
    def perplexity(self) -> dict[str, float]:
        """Held-out perplexity of `teacher`, `pruned`, `distilled`, as far as they were measured."""
        return {name: value for name, value in self.summary["perplexity"].items() if value is not None}

    @property
    def told(self) -> str:
        """Perplexities and seconds in words."""
        values = ", ".join(f"{name} {value:.2f}" for name, value in self.perplexity.items())
        return f"perplexity {values}; {self.seconds:.0f} s"


def run_recipe(words: Sequence[str], folder: Path, *, limit: float) -> Finished:
    """Run `nemo-minitron` with these words and `--run-dir folder`, for `limit` seconds at most.

    A check that is given up would leave it on the card, beside all that come after.

    Raises:
        RuntimeError: It failed; the end of what it printed.
        subprocess.TimeoutExpired: It took longer, and is gone.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", *words, "--run-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    seconds = time.perf_counter() - started
    return Finished(summary=json.loads((folder / "summary.json").read_text(encoding="utf-8")), seconds=seconds)
