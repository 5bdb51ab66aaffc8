"""A run that learns from a cache of the teacher's targets, undisturbed, killed while it writes, and shared."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support import runs as one_round
from tests.support.runs import environment, start, wait_for, weights

pytestmark = pytest.mark.slow

inputs = one_round.inputs
CACHE = ["cache.samples_per_shard=8", "cache.micro_batch_size=2", "distill.lm_weight=0.5"]


def finish(run: Path, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        one_round.command(run, overrides), capture_output=True, text=True, env=environment(), check=False
    )


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("cached") / "run"
    done = finish(run, [*inputs, *CACHE])
    assert done.returncode == 0, done.stderr
    return run


def test_the_student_learns_and_the_report_says_from_what(undisturbed):
    result = json.loads((undisturbed / "stages/distill/result.json").read_text())
    assert result["validation"]["ce"] < result["history"][0]["ce"] - 0.1
    assert "from a cache of 50 draws per token" in result["objective"]
    cache = json.loads((undisturbed / "stages/cache/result.json").read_text())
    assert cache["samples"] == 160
    assert 1 < cache["bytes_per_token"] < 50 * 3
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["perplexity"]["distilled"] < summary["perplexity"]["pruned"]
    assert (undisturbed / "report.html").is_file()


def test_killed_while_it_writes_the_same_command_goes_on(undisturbed, inputs, tmp_path):
    run = tmp_path / "run"
    process = start(run, [*inputs, *CACHE])
    wait_for(lambda: len(list(run.glob("stages/**/targets-*.bin"))) >= 3, process)
    process.kill()
    process.communicate()
    written = {path.name: path.stat().st_mtime_ns for path in run.glob("stages/**/targets-*.bin")}
    assert written
    done = finish(run, [*inputs, *CACHE])
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in run.glob("stages/cache/targets/targets-*.bin")}
    assert len(after) == 20
    assert all(after[name] == moment for name, moment in written.items()), "what was complete stays"
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())


def test_one_cache_teaches_several_students_and_no_other_data(inputs, tmp_path):
    shared = [*inputs, *CACHE, f"cache.folder={tmp_path / 'targets'}"]
    assert finish(tmp_path / "one", shared).returncode == 0
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "targets").iterdir()}
    smaller = finish(tmp_path / "two", [*shared, "target.ffn_hidden_size=32"])
    assert smaller.returncode == 0, smaller.stderr
    assert made == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "targets").iterdir()}
    other = finish(tmp_path / "three", [*shared, "seed=7"])
    assert other.returncode == 2
    assert "holds another cache" in other.stderr
    assert "order_digest" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.divergence=reverse_kl", "unbiased for forward_kl alone"),
        ("distill.top_k=50", "cache.k"),
        ("distill.ramp_to.temperature=2", "one temperature"),
    ],
)
def test_what_a_cache_cannot_give_is_told_at_once(inputs, tmp_path, override, message):
    done = finish(tmp_path / "run", [*inputs, *CACHE, override])
    assert done.returncode == 2
    assert message in done.stderr
