"""Killed at twenty random moments, a run goes on each time and ends with the same weights."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

from tests import chain_jobs
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama

KILLS = 20
# Two rounds, with everything in training that has a memory: validations, the best model, several checkpoints.
CHANGES = {
    "rounds": 2,
    "target": {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64},
    "distill": {
        "tokens": 8 * 8 * 64,
        "validate_every": 2,
        "checkpoint_every": 3,
        "keep_last": 2,
        "patience": 50,
        "finish_with": "best",
        "guard": {"spike_factor": 100.0},
    },
    "evaluate": {"max_tokens": 128, "sample_tokens": 1},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=60)
    write_corpus(folder / "corpus", documents=30)
    return folder


def whole(run: Path, inputs: Path) -> float:
    """The run up to distillation; returns its seconds."""
    started = time.monotonic()
    chain_jobs.run_to(run, inputs, "distill", **CHANGES)
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute by itself; delays grow with what an undisturbed run takes on a busy machine
def test_twenty_kills_change_nothing(inputs, tmp_path):
    (seconds,) = run_on_ranks(1, whole, tmp_path / "undisturbed", inputs)
    expected = chain_jobs.weights(tmp_path / "undisturbed")
    rng = random.Random(20)
    kills, runs, moments = 0, 0, set()
    while kills < KILLS:
        run = tmp_path / f"run{runs}"
        while kills < KILLS and not (run / "stages/distill/DONE").is_file():
            if killed_after(rng.uniform(0.0, 0.35 * seconds), run, inputs):
                kills += 1
                moments |= {path.name for path in run.glob("stages/.*.partial")}
        run_on_ranks(1, whole, run, inputs)
        found = chain_jobs.weights(run)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items()), f"run {runs}"
        for stage in ("distill.1", "distill"):
            result = json.loads((run / f"stages/{stage}/result.json").read_text())
            assert [row["step"] for row in result["history"]] == [0, 2, 4, 6, 8], "every validation was done once"
        runs += 1
    assert {".distill.1.partial", ".distill.partial"} & moments, "some struck while training"


def killed_after(seconds: float, run: Path, inputs: Path) -> bool:
    """Start the run in a process of its own and kill it so long after it began to work; False if it was done before."""
    context = multiprocessing.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_go, args=(run, inputs, writer), daemon=True)
    process.start()
    writer.close()
    try:
        reader.recv_bytes()
        process.join(seconds)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return False
        process.kill()
        process.join()
        return True
    finally:
        reader.close()


def _go(run: Path, inputs: Path, writer) -> None:
    torch.set_num_threads(1)
    writer.send_bytes(b"begun")
    writer.close()
    whole(run, inputs)
