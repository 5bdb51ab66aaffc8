import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_loss_benchmark_prints_a_line_for_each_implementation():
    command = [sys.executable, "-m", "benchmarks.kd_loss", "--json", "--implementations", "fused", "dense"]
    sizes = ["--tokens", "512", "--vocabulary", "65536", "--hidden", "8", "--rounds", "1", "--tensor-parallel", "1"]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, check=True)
    fused, dense = (json.loads(line) for line in done.stdout.splitlines())
    assert [row.pop("implementation") for row in (fused, dense)] == ["fused", "dense"]
    for row in (fused, dense):
        assert row.keys() == {"tensor_parallel", "peak_buffers", "seconds"}
        assert row["tensor_parallel"] == 1
        assert row["seconds"] > 0
    # The dense form holds the logits of both models and their log-probabilities, at the least.
    assert dense["peak_buffers"] > 4
    # At this size the fused one takes the smallest memory it works in: two chunks, each of both models' logits.
    assert 0.5 < fused["peak_buffers"] < 1.2
