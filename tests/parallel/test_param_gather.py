"""Gathering weights during the forward pass changes no bit, whoever reads them, and wherever it is stopped."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.parallel.overlap_jobs import Run, train_and_go_on, train_gathering
from tests.ranks import run_on_ranks

PATIENCE = 500.0
HOW = {"distributed": True, "steps": 20, "validations": (1, 7, 8, 20)}
ONE = ParallelConfig()
TWO_RANKS = [
    Run("tied", ONE, **HOW),
    Run("untied", ONE, kind="text", **HOW),
    Run("untied", ONE, kind="top_k", **HOW),
    Run("untied", ONE, kind="frozen", **HOW),
]
FOUR_RANKS = [
    Run("untied", ParallelConfig(tensor=2), **HOW),
    Run("tied", ParallelConfig(pipeline=2), **HOW),
    Run("untied", ParallelConfig(pipeline=2, virtual_pipeline=2), **HOW),
]


# Small enough that experts, and the convolution and norm of a Mamba mixer, have buckets that hold nothing else.
APART = {"grad_bucket_size": 150}
FEW = {"distributed": True, "steps": 5, "validations": (2,)}
READ_ELSEWHERE = [
    Run("experts", ParallelConfig(**APART), **FEW),
    Run("experts", ParallelConfig(expert=2, **APART), **FEW),
    Run("nemotron_h", ParallelConfig(**APART), **FEW),
]


def assert_same(plain, late):
    for name in ("losses", "norms", "validated"):
        assert late[name] == plain[name], name
    assert late["weights"].keys() == plain["weights"].keys()
    for name, weight in plain["weights"].items():
        assert torch.equal(late["weights"][name], weight), name


def assert_gathered_late(run, plain, late):
    assert_same(plain, late)
    assert len(late["losses"]) == run.steps
    assert late["losses"][-1] < late["losses"][0]
    assert set(plain["gathering"]) == {(0, 0)}
    # After a step the first bucket of each chunk, and of its experts, is on its way; the others are out of date.
    assert late["chains"] >= (run.parallel.virtual_pipeline or 1)
    assert set(late["gathering"]) == {(late["chains"], late["buckets"] - late["chains"])}, run
    assert set(late["waiting"]) == {0}, "a validation begins with all weights"


@pytest.mark.slow
@pytest.mark.parametrize("runs", [TWO_RANKS, FOUR_RANKS], ids=["DP2", "DP2 with TP2, PP2, VPP2"])
def test_twenty_steps_with_validations_between_are_bit_identical(runs):
    ranks = 2 * runs[0].parallel.model_parallel_size
    for results in run_on_ranks(ranks, train_gathering, runs, timeout=PATIENCE):
        for run, (plain, late) in zip(runs, results, strict=True):
            assert_gathered_late(run, plain, late)


@pytest.mark.parametrize("run", READ_ELSEWHERE, ids=["experts", "experts, EP2", "Mamba"])
def test_weights_that_are_read_outside_of_their_modules_are_waited_for(run):
    for [(plain, late)] in run_on_ranks(2, train_gathering, [run], timeout=PATIENCE):
        assert_gathered_late(run, plain, late)
        assert late["chains"] == (2 if run.spec == "experts" else 1)


@pytest.mark.slow
def test_experts_on_pipeline_stages_and_half_of_the_replicas_are_waited_for():
    runs = [Run("experts", ParallelConfig(expert=2), **FEW), Run("alike", ParallelConfig(pipeline=2), **FEW)]
    for results in run_on_ranks(4, train_gathering, runs, timeout=PATIENCE):
        for run, (plain, late) in zip(runs, results, strict=True):
            assert_gathered_late(run, plain, late)


SMALL = {"overlap_grad_reduce": True, "grad_bucket_size": 2000}
LATE = {**SMALL, "overlap_param_gather": True}
RESUMED = {
    "weights gathered late, tied": (2, Run("tied", ParallelConfig(**LATE), **HOW)),
    "weights gathered late, untied": (2, Run("untied", ParallelConfig(**LATE), **HOW)),
    "gradients in small buckets": (2, Run("tied", ParallelConfig(**SMALL), **HOW)),
    # Megatron gives a tied embedding a bucket of its own, overlapping or not.
    "tied pipeline stages": (4, Run("tied", ParallelConfig(pipeline=2), **HOW)),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(case, tmp_path):
    """Where weights are gathered late, half of them are out of date when it is saved; buckets end with padding."""
    ranks, run = RESUMED[case]
    run = replace(run, validations=(), folder=tmp_path / "state")
    for complete, resumed in run_on_ranks(ranks, train_and_go_on, run, timeout=PATIENCE):
        assert resumed["losses"] == complete["losses"][10:]
        assert resumed["norms"] == complete["norms"][10:]
        for name, weight in complete["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name
