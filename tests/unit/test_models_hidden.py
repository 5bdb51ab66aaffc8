"""What the balance between divergence and hidden loss remembers of a batch that is not finite: nothing."""

import math
from types import SimpleNamespace

import pytest
import torch

from nemo_minitron.config.hidden import HiddenBalance, HiddenConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.models.hidden import StateMatching
from tests.parallel.megatron_jobs import SPECS

GOOD, BAD = (6.0, 2.0), ((math.nan, 2.0), (6.0, math.nan), (math.inf, 2.0), (6.0, math.inf))
"""Sums of the divergence and of the hidden loss."""


def losses(balance, batches, monkeypatch):
    """The loss of one training step a batch, without a model: its sums are given."""
    alone = SimpleNamespace(pp=None, dp_cp=None, tp=None)
    here = SimpleNamespace(parallel=ParallelConfig(), device=torch.device("cpu"), seed=0, groups=alone)
    config = HiddenConfig(layers=((1, 1),), balance=balance)
    matching = StateMatching(
        config, student=SPECS["tied"], teacher=SPECS["tied"], runtime=here, optimizer=OptimizerConfig()
    )
    found = []
    for divergence, hidden in batches:
        monkeypatch.setattr(matching, "total", lambda hidden=hidden: hidden)

        def one_pass(*, training, divergence=divergence):
            return {"kl": divergence, "loss": divergence}

        found.append(matching.run(one_pass, [], weight=1.0, training=True)["loss"])
    return found


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("balance", HiddenBalance)
def test_a_batch_that_is_not_finite_costs_its_own_step_alone(balance, bad, monkeypatch):
    found = losses(balance, [GOOD, bad, GOOD, GOOD], monkeypatch)
    good = 8.0 if balance is HiddenBalance.NONE else 12.0  # 6 + 2, or twice the divergence
    assert not math.isfinite(found[1]), "the guard refuses this step"
    assert [found[0], *found[2:]] == [good] * 3


@pytest.mark.parametrize("bad", BAD)
def test_nor_does_it_where_it_is_the_first(bad, monkeypatch):
    first, *others = losses(HiddenBalance.PREVIOUS_STEP, [bad, GOOD, GOOD], monkeypatch)
    assert not math.isfinite(first)
    assert others == [12.0, 12.0]
