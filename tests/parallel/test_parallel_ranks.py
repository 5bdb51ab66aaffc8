import os

import pytest
import torch
from torch import distributed

from tests.ranks import RankError, run_on_ranks


def add_ranks(offset):
    total = torch.tensor(float(distributed.get_rank())) + offset
    distributed.all_reduce(total)
    return total, int(os.environ["RANK"]), torch.get_num_threads()


def fail_on_rank_one():
    if distributed.get_rank() == 1:
        raise ValueError("told to fail")
    distributed.barrier()


def test_every_rank_answers():
    results = run_on_ranks(3, add_ranks, 1.0)
    assert [rank for _, rank, _ in results] == [0, 1, 2]
    assert {(total.item(), threads) for total, _, threads in results} == {(6.0, 1)}


def test_a_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RankError, match=r"(?s)rank 1 .*told to fail"):
        run_on_ranks(2, fail_on_rank_one)
