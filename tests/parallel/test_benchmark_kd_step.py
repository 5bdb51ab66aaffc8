import pytest
import torch

from benchmarks import kd_step
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.megatron import optim, runtime

TEACHER = ModelSpec(
    vocab_size=96,
    hidden_size=32,
    head_dim=8,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48),) * 3,
    max_position_embeddings=64,
    rotary_base=100000.0,
    tied_embeddings=True,
)
STUDENT = TEACHER.with_sizes(num_layers=2, ffn_hidden_size=40)


@pytest.fixture
def here():
    yield runtime.start(ParallelConfig(), seed=0)
    runtime.stop()


@pytest.mark.parametrize("objective", kd_step.OBJECTIVES)
def test_both_sides_compute_the_same_and_train_the_same(objective, here):
    contest = kd_step.Contest(
        here,
        samples=2,
        length=32,
        precision=Precision.FP32,
        objective=kd_step.OBJECTIVES[objective],
        teacher=TEACHER,
        student=STUDENT,
    )
    contest.check(Precision.FP32)
    ours = optim.unwrap(contest.student[-1])
    theirs = contest.theirs.student
    # The same weights after two steps, looked at where no packing comes between.
    torch.testing.assert_close(ours.output_weight(), theirs.lm_head.weight, rtol=0, atol=2e-6)
    for mine, other in zip(ours.decoder.layers, theirs.model.layers, strict=True):
        torch.testing.assert_close(mine.mlp.linear_fc2.weight, other.mlp.down_proj.weight, rtol=0, atol=2e-6)


def test_each_ratio_is_taken_within_a_round():
    times = {"teacher": [1.0, 2.0], "student": [3.0, 6.0], "ours": [5.0, 8.0], "transformers": [6.0, 12.0]}
    assert kd_step.ratios(times) == {"efficiency": [0.8, 1.0], "over_transformers": [1.2, 1.5]}


def test_the_order_is_turned_round_every_time():
    order = []
    times = kd_step.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [len(own) for own in times.values()] == [3, 3]
