"""Adding gradients up during the backward pass changes nothing, in small buckets, tied output layers or not."""

import pytest

from nemo_minitron.config.parallel import ParallelConfig
from tests.parallel.overlap_jobs import STEPS, Run, same, train_both
from tests.ranks import run_on_ranks

ONE = ParallelConfig()
PATIENCE = 500.0
RUNS = [
    Run("tied", ONE, distributed=False),
    Run("tied", ONE, distributed=True),
    Run("untied", ONE, distributed=True, kind="text"),
    Run("untied", ONE, distributed=False, kind="top_k"),
    Run("untied", ONE, distributed=False, kind="frozen"),
]


@pytest.mark.slow
def test_two_data_parallel_ranks_train_the_same_with_and_without_overlap():
    for results in run_on_ranks(2, train_both, RUNS, timeout=PATIENCE):
        for run, (plain, overlapping) in zip(RUNS, results, strict=True):
            assert same(run, plain, overlapping), run
            assert plain["losses"][-1] < plain["losses"][0]
            assert plain["under way"] == [0] * STEPS
            # The first step counts, and sends at its end. In the others every bucket is under way before that.
            assert overlapping["buckets"] > 2
            assert overlapping["under way"] == [0] + [overlapping["buckets"]] * (STEPS - 1), run


@pytest.mark.slow
def test_pipeline_stages_train_the_same_with_and_without_overlap():
    runs = [
        Run("tied", ParallelConfig(pipeline=2), distributed=False),
        Run("untied", ParallelConfig(pipeline=2, virtual_pipeline=2), distributed=True),
    ]
    for results in run_on_ranks(4, train_both, runs, timeout=PATIENCE):
        for run, (plain, overlapping) in zip(runs, results, strict=True):
            assert same(run, plain, overlapping), run
            assert overlapping["under way"][-1] == overlapping["buckets"], run
