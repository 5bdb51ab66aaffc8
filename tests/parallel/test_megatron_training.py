"""What helps training along: recomputed activations change nothing, and the learning rate follows its formula."""

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig, Recompute
from nemo_minitron.config.training import OptimizerConfig, Schedule
from tests.parallel.megatron_jobs import Case, train
from tests.parallel.overlap_jobs import Run, train_each
from tests.ranks import run_on_ranks


def train_and_count(cases: list[Case]) -> list[dict[str, object]]:
    """As `train`, with the number of times an FFN and an attention were computed."""
    from nemo_minitron.megatron import layers

    counts = {"ffn": 0, "attention": 0}

    def counted(kind: type, name: str) -> None:
        inner = kind.forward

        def forward(self, *args, **kwargs):
            counts[name] += 1
            return inner(self, *args, **kwargs)

        kind.forward = forward

    counted(layers.LocalMLP, "ffn")
    counted(layers.LocalSelfAttention, "attention")
    results = []
    for case in cases:
        counts.update(ffn=0, attention=0)
        results.append(train(case) | dict(counts))
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputed_activations_give_the_same_training(ranks: int) -> None:
    cases = [Case("tied", ParallelConfig(tensor=ranks, recompute=kind)) for kind in Recompute]
    for plain, selective, full in run_on_ranks(ranks, train_and_count, cases):
        for other in (selective, full):
            assert other["losses"] == plain["losses"]
            assert other["norms"] == plain["norms"]
            assert all(torch.equal(weight, other["weights"][name]) for name, weight in plain["weights"].items())
        ffn, attention = plain["ffn"], plain["attention"]
        assert (selective["ffn"], selective["attention"]) == (2 * ffn, attention)
        assert (full["ffn"], full["attention"]) == (2 * ffn, 2 * attention)


@pytest.mark.parametrize("stages", [1, 2])
def test_recomputed_activations_have_gradients_behind_a_frozen_embedding(stages: int) -> None:
    """What enters the first layer needs no gradient then, and Megatron recomputes only what has one."""
    runs = [
        Run("untied", ParallelConfig(pipeline=stages, recompute=kind), distributed=False, kind="frozen")
        for kind in Recompute
    ]
    for plain, *others in run_on_ranks(stages, train_each, runs):
        for other in others:
            assert other["losses"] == plain["losses"]
            assert other["norms"] == plain["norms"]
            assert all(torch.equal(weight, other["weights"][name]) for name, weight in plain["weights"].items())


def learning_rates(config: OptimizerConfig, steps: int) -> list[float]:
    """Of each step, without gradients."""
    from nemo_minitron.config.parallel import Precision
    from nemo_minitron.megatron import optim, runtime
    from nemo_minitron.megatron.build import build_chunks
    from tests.parallel.megatron_jobs import ONE, SPECS

    chunks = build_chunks(SPECS["tied"], runtime.start(ONE, seed=0), Precision.FP32, seed=7)
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.build_optimizer(wrapped, config, Precision.FP32, steps)
    optimizer.zero_grad()
    rates = [optimizer.step().lr for _ in range(steps)]
    runtime.stop()
    return rates


def test_warm_up_stable_decay() -> None:
    """20 steps, 4 of warm-up, the last 5 down from 1 to 0.1: the rate of step `t` by its definition."""
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4, schedule=Schedule.WSD, decay_fraction=0.25)
    expected = [min(t / 4, 1.0) if t <= 15 else 1.0 - 0.9 * (t - 15) / 5 for t in range(1, 21)]
    assert run_on_ranks(1, learning_rates, config, 20)[0] == pytest.approx(expected)


def test_constant_after_warm_up() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4, schedule=Schedule.CONSTANT)
    assert run_on_ranks(1, learning_rates, config, 10)[0] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)
