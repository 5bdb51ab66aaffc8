"""Runs of the tiny recipe from the command line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import stream
from tests.tiny import write_corpus, write_llama

RECIPE = Path(__file__).parents[2] / "recipes/tiny/tiny_cpu.yaml"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Overrides that name a model and a corpus."""
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    return [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]"]


def command(run: Path, inputs: list[str], recipe: Path = RECIPE) -> list[str]:
    return [sys.executable, "-m", "nemo_minitron", "run", str(recipe), *inputs, "--run-dir", str(run)]


def environment(temporary: Path | None = None) -> dict[str, str]:
    """Of a run, with a temporary folder of its own if one is given."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | ({} if temporary is None else {"TMPDIR": str(temporary)})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(stream(open_checkpoint(run / "stages/distill/student")))


def start(run: Path, inputs: list[str], recipe: Path = RECIPE, temporary: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(run, inputs, recipe),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(temporary),
    )


def wait_for(happened, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        time.sleep(0.02)


def training_rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [row for row in rows if "train/loss" in row]
