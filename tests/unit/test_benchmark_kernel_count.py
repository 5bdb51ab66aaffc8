"""The published count of launches and bytes on a GPU, and the counter itself on operations whose traffic is known."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.kernel_count import Traffic, count
from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import Divergence

pytest.importorskip("triton")

TOKENS, VOCABULARY, HIDDEN = 8192, 128256, 4096


def test_the_published_numbers():
    command = [sys.executable, "-m", "benchmarks.kernel_count", "--json"]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert row["launches"] <= 400
    # Both passes of the kernels read both models' logits, the second writes the student's: five times 2 bytes each.
    logits = TOKENS * VOCABULARY
    assert 10 * logits < row["elementwise_bytes"] < 11 * logits
    assert row["elementwise_bytes"] <= 60e9
    # Two output layers and two gradients, in two chunks.
    assert row["products"] == 8


@pytest.mark.parametrize("kind", DivergenceKind)
@pytest.mark.parametrize("statistics", [False, True])
def test_every_divergence_stays_below(kind, statistics):
    sizes = {"tokens": TOKENS, "vocabulary": VOCABULARY, "hidden": HIDDEN}
    traffic = count(**sizes, divergence=Divergence(kind=kind, temperature=2.0), statistics=statistics)
    assert traffic.launches.total() <= 400
    assert traffic.elementwise_bytes <= 60e9
    dense = count(**sizes, divergence=Divergence(kind=kind, temperature=2.0), statistics=statistics, form="torch")
    assert dense.elementwise_bytes > 5 * traffic.elementwise_bytes


def test_the_counter():
    x, y = (torch.empty(8, 4, device="meta") for _ in range(2))
    size = 8 * 4 * 4
    with Traffic() as traffic:
        x.view(4, 8).t()
        torch.empty_like(x)
    assert (traffic.launches.total(), traffic.elementwise_bytes) == (0, 0)
    for operation, moved in (
        (lambda: x + y, 3 * size),
        (lambda: x.add_(y), 3 * size),
        (lambda: x.copy_(y), 2 * size),
        (lambda: torch.exp(x, out=y), 2 * size),
        (lambda: x.add_(y[:, :1]), 2 * size + size // 4),
        (lambda: x.add_(y[:, :1].expand(8, 4)), 2 * size + size // 4),
        (x.zero_, size),
        (x.sum, size + 4),
    ):
        with Traffic() as traffic:
            operation()
        assert (traffic.launches.total(), traffic.elementwise_bytes) == (1, moved)
    with Traffic() as traffic:
        torch.mm(x, y.t())
    assert (traffic.products, traffic.product_bytes, traffic.elementwise_bytes) == (1, 2 * size + 8 * 8 * 4, 0)
