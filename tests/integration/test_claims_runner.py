"""The runner of the claims on a tiny model: one process, a line for each trial, and a set that was cut off goes on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.megatron.data import WindowDataset
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLAIMS = ("beginning", "cache", "correction", "iterative")
SMALL = (
    "distill.tokens=3072",
    "distill.batch.micro_batch_size=1",
    "evaluate.max_tokens=512",
    "score.depth.metrics=[lm_loss]",
    "score.depth.blocks=true",
    "score.depth.longest_block=1",
    "score.depth.samples=2",
)


def command(folder: Path, *claims: str) -> str:
    words = [sys.executable, "-m", "benchmarks.claims", "--work", str(folder / "work"), "--seeds", "3"]
    words += [f"--claim={claim}" for claim in claims]
    words += ["--recipe", str(ROOT / "recipes/tiny/tiny_cpu.yaml")]
    inputs = [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, *SMALL, *inputs], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("claims")
    write_llama(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    return folder, command(folder, *CLAIMS)


def rows(folder: Path) -> dict[tuple[str, str], dict]:
    lines = (folder / "work/results.jsonl").read_text().splitlines()
    return {(row["student"], row["lesson"]): row for row in map(json.loads, lines)}


def mean(row: dict, name: str) -> float:
    return sum(row[name]) / len(row[name])


def test_every_trial_has_a_line(finished):
    folder, told = finished
    found = rows(folder)
    assert len(found) == 1 + 7 + 3 + 2 + 4  # what is shared, and the trials that each claim adds to those before it
    assert found.pop(("preparation", ""))["seconds"] > 0
    assert all(len(row[name]) == 8 for row in found.values() for name in ("nats", "kl", "teacher_nats"))
    assert all(row["tokens"] == 3072 and row["seed"] == 3 for row in found.values())
    for title in ("Pruned, or random, at equal tokens", "Sampled targets from a cache"):
        assert f"## {title}" in told


def test_the_teacher_is_measured_as_transformers_would(finished):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64)
    windows = WindowDataset(folder / "work/seed3/run/stages/data", "heldout", 64, 8, spread=True)
    expected = []
    for item in windows:
        with torch.no_grad():
            logits = model(item["tokens"][None]).logits[0]
        expected.append(torch.nn.functional.cross_entropy(logits, item["labels"]).item())
    for row in (row for row in rows(folder).values() if "nats" in row):
        assert row["teacher_nats"] == pytest.approx(expected, abs=2e-5)


def test_students_learn_and_keep_what_they_began_with(finished):
    found = rows(finished[0])
    whole = found["width, l2 mean", ""]["parameters"]
    for student, lesson in found.keys() - {("preparation", "")}:
        if lesson:
            assert mean(found[student, lesson], "nats") < mean(found[student, ""], "nats")
        if student.startswith("width"):
            assert found[student, lesson]["parameters"] == whole
    assert mean(found["width, random weights", ""], "nats") == pytest.approx(math.log(256), abs=0.2)
    exact, drawn = (mean(found["depth, best block", name], "kl") for name in ("forward KL", "KL, 50 cached draws"))
    assert 0 < abs(exact - drawn) < 0.25 * exact


def test_a_set_that_was_cut_off_goes_on(finished):
    folder, _ = finished
    path = folder / "work/results.jsonl"
    complete = path.read_text()
    lines = complete.splitlines(keepends=True)
    last = json.loads(lines[-1])
    path.write_text("".join(lines[:-1]) + lines[-1][:40])
    command(folder, *CLAIMS)
    again = path.read_text()
    assert again.startswith("".join(lines[:-1]))
    measured = ("student", "lesson", "nats", "kl", "parameters")
    assert [json.loads(again.splitlines()[-1])[name] for name in measured] == [last[name] for name in measured]
