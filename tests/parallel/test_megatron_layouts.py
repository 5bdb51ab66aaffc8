"""However a model and its batch are spread over ranks, losses, gradient norms and updated weights are one rank's."""

from functools import cache
from typing import Any

import pytest
import torch

from nemo_minitron.arch.weights import weight_named
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.megatron.placement import local_shard
from tests.parallel.megatron_jobs import ALL_SPECS, Case, train_all
from tests.ranks import run_on_ranks

PP2 = ParallelConfig(pipeline=2)
VPP2 = ParallelConfig(pipeline=2, virtual_pipeline=2)
LAYOUTS = {
    "TP2 tied": (2, Case("tied", ParallelConfig(tensor=2))),
    "TP2 untied": (2, Case("untied", ParallelConfig(tensor=2), micro_batch_size=2)),
    "TP2 uneven layers": (2, Case("uneven", ParallelConfig(tensor=2))),
    "PP2 tied": (2, Case("tied", PP2)),
    "PP2 untied": (2, Case("untied", PP2)),
    "PP2, 3 layers of different sizes": (2, Case("uneven", PP2)),
    "PP2 VPP2 tied": (2, Case("tied", VPP2)),
    "PP2 VPP2 untied": (2, Case("untied", VPP2, micro_batch_size=2)),
    "TP2 qwen3": (2, Case("qwen3", ParallelConfig(tensor=2))),
    "TP2 nemotron": (2, Case("nemotron", ParallelConfig(tensor=2), micro_batch_size=2)),
    "TP2 gemma3": (2, Case("gemma3", ParallelConfig(tensor=2), micro_batch_size=2)),
    "TP2 sublayers": (2, Case("sublayers", ParallelConfig(tensor=2))),
    "PP2 sublayers": (2, Case("sublayers", PP2)),
    "TP2 nemotron_h": (2, Case("nemotron_h", ParallelConfig(tensor=2), micro_batch_size=2)),
    "PP2 nemotron_h": (2, Case("nemotron_h", PP2)),
    "PP2 VPP2 nemotron_h": (2, Case("nemotron_h", VPP2)),
    "TP2 bamba": (2, Case("bamba", ParallelConfig(tensor=2), micro_batch_size=2)),
    "PP2 bamba, Mamba on the second stage alone": (2, Case("bamba", PP2)),
    "PP2 VPP2 bamba": (2, Case("bamba", VPP2)),
    "PP2 qwen3": (2, Case("qwen3", PP2)),
    "PP2 nemotron": (2, Case("nemotron", PP2)),
    "PP2 VPP2 gemma3": (2, Case("gemma3", VPP2)),
    "DP2": (2, Case("tied", micro_batch_size=2)),
    "DP2 distributed optimizer": (2, Case("tied", distributed=True)),
    "DP1 micro-batches of 4": (1, Case("tied", micro_batch_size=4)),
    "TP3, 9 heads in 3 groups": (3, Case("three groups", ParallelConfig(tensor=3))),
    "TP2 PP2": (4, Case("tied", ParallelConfig(tensor=2, pipeline=2))),
    "PP2 DP2 distributed optimizer": (4, Case("tied", PP2, distributed=True)),
}


@cache
def _runs(world_size: int) -> dict[str, list[dict[str, Any]]]:
    """Every case of a world size; one start-up serves them all."""
    if world_size == 0:
        names = list(ALL_SPECS)
        cases = [Case(name) for name in names]
        (results,) = run_on_ranks(1, train_all, cases)
        return {name: [result] for name, result in zip(names, results, strict=True)}
    names = [name for name, (size, _) in LAYOUTS.items() if size == world_size]
    results = run_on_ranks(world_size, train_all, [LAYOUTS[name][1] for name in names])
    return {name: [rank[index] for rank in results] for index, name in enumerate(names)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_at_every_layout(layout: str) -> None:
    world_size, case = LAYOUTS[layout]
    (alone,) = _runs(0)[case.spec]
    assert alone["losses"][-1] < alone["losses"][0]
    for rank in _runs(world_size)[layout]:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
        _check_weights(rank, alone["weights"], case)


def _check_weights(rank: dict[str, Any], full: dict[str, torch.Tensor], case: Case) -> None:
    spec = ALL_SPECS[case.spec]
    size = case.parallel.tensor
    for name, mine in rank["weights"].items():
        shard = local_shard(weight_named(spec, name), full[name], spec, rank=rank["tp"], size=size)
        torch.testing.assert_close(mine, shard, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_every_weight_is_somewhere() -> None:
    for layout in ("PP2 untied", "PP2 VPP2 untied", "PP2, 3 layers of different sizes"):
        found = {name for rank in _runs(2)[layout] for name in rank["weights"]}
        assert found == set(_runs(0)[LAYOUTS[layout][1].spec][0]["weights"])


def test_two_copies_of_a_tied_embedding_stay_equal() -> None:
    first, last = (rank["weights"]["embedding.word_embeddings.weight"] for rank in _runs(2)["PP2 tied"])
    assert torch.equal(first, last)
