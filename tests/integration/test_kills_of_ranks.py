"""Twenty kills of random ranks of four at random moments: each time the job goes on, and ends with the same weights."""

import hashlib
import json
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests import chain_jobs
from tests.ranks import RankError, collect, run_on_ranks, started
from tests.tiny import write_corpus, write_llama

KILLS = 20
RANKS = 4
# Two tensor-parallel ranks, two data-parallel ones, and their optimizer states in shares.
CHANGES = {
    "parallel": {"tensor": 2},
    "target": {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4},
}
DISTILL = {
    "tokens": 12 * 4 * 32,
    "batch": {"sequence_length": 32, "micro_batch_size": 1, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2, "distributed": True},
    "validate_every": 6,
    "validation_samples": 4,
    "checkpoint_every": 2,
    "finish_with": "best",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=60)
    write_corpus(folder / "corpus", documents=30)
    return folder


@pytest.fixture(scope="module")
def pruned(inputs, tmp_path_factory) -> Path:
    """A run folder with all that is before training."""
    run = tmp_path_factory.mktemp("pruned") / "run"
    run_on_ranks(1, prune, run, inputs)
    return run


def prune(run: Path, inputs: Path) -> None:
    chain_jobs.run_to(run, inputs, "prune", target=CHANGES["target"])


def distill(run: Path, inputs: Path, settings: dict, begun: Path) -> float:
    """The rest of the run up to distillation; returns its seconds."""
    (begun / str(torch.distributed.get_rank())).touch()
    started_at = time.monotonic()
    chain_jobs.run_to(run, inputs, "distill", distill={**DISTILL, **settings}, **CHANGES)
    return time.monotonic() - started_at


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_of_random_ranks_change_nothing(inputs, pruned, tmp_path):
    undisturbed = shutil.copytree(pruned, tmp_path / "undisturbed")
    (tmp_path / "begun").mkdir()
    seconds = max(run_on_ranks(RANKS, distill, undisturbed, inputs, {}, tmp_path / "begun"))
    expected = chain_jobs.weights(undisturbed)
    rng = random.Random(20)
    kills, runs, resumed = [], 0, 0
    while len(kills) < KILLS:
        run = shutil.copytree(pruned, tmp_path / f"run{runs}")
        settings = {"async_save": runs % 2 == 1}
        while len(kills) < KILLS and not (run / "stages/distill/DONE").is_file():
            rank, moment = rng.randrange(RANKS), rng.uniform(0.0, 0.6 * seconds)
            if killed(rank, moment, (run, inputs, settings, tmp_path / "begun")):
                kills.append(rank)
                resumed += check_checkpoints(run)
            else:
                seconds *= 0.7  # the machine was busier when it was measured
        run_on_ranks(RANKS, distill, run, inputs, settings, tmp_path / "begun")
        found = chain_jobs.weights(run)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items()), f"run {runs}"
        result = json.loads((run / "stages/distill/result.json").read_text())
        assert [row["step"] for row in result["history"]] == [0, 6, 12], "every validation was done once"
        runs += 1
    assert set(kills) == set(range(RANKS)), "every rank was killed"
    assert resumed >= KILLS // 4, "many went on from a checkpoint"


def killed(rank: int, moment: float, job: tuple[Path, Path, dict, Path]) -> bool:
    """Start `distill` and kill one rank so long after all began; False if the run was done before.

    The others must notice, and must have met nothing else that was wrong.
    """
    begun = job[-1]
    for path in begun.iterdir():
        path.unlink()
    with started(RANKS, distill, *job) as (processes, readers):
        while len(list(begun.iterdir())) < RANKS:
            time.sleep(0.01)
        processes[rank].join(moment)
        processes[rank].kill()
        try:
            collect(readers, timeout=60)
            return False
        except RankError as error:
            told = dict(re.findall(r"--- rank (\d) ---\n(.*?)(?=\n--- rank|\Z)", str(error), flags=re.DOTALL))
    assert told.pop(str(rank)) == "the process died without a word"
    for text in told.values():
        assert "LostRankError: rank" in text, text
        assert "Damaged" not in text
        assert "CheckpointError" not in text.splitlines()[-1]
    return True


def check_checkpoints(run: Path) -> bool:
    """Whatever has a checkpoint's name is complete, by a reading that is not ours; returns whether there is one."""
    folders = sorted(run.glob("stages/.distill.partial/checkpoints/*"))
    assert not [path for path in folders if path.suffix == ".damaged"], "no attempt found a damaged one"
    whole = [path for path in folders if path.suffix == ".ckpt" and not path.name.startswith(".")]
    for path in whole:
        lines = (path / "SHA256SUMS").read_text().splitlines()
        listed = {line[66:]: line[:64] for line in lines}
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
        files.pop("SHA256SUMS")
        assert files == listed
        assert {".metadata", "metadata.json"} <= listed.keys()
        assert sum(name.endswith(".distcp") for name in listed) >= RANKS
    return bool(whole)
