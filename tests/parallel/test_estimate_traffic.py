"""The cost model against real steps: bytes of every collective, operations, bytes of a checkpoint."""

from collections import Counter
from dataclasses import replace

import pytest

from nemo_minitron.arch.layer import LayerSpec, Mamba, Moe, transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute
from nemo_minitron.estimate.activations import Pass
from nemo_minitron.estimate.communication import Collective, Split, Traffic, checkpoint_bytes, step_traffic
from nemo_minitron.estimate.compute import training_flops
from nemo_minitron.estimate.memory import Training
from tests.parallel.traffic_jobs import LENGTH, MICRO_BATCHES, SAMPLES, distill_once, train_once
from tests.ranks import run_on_ranks

STUDENT = ModelSpec(
    vocab_size=512,
    hidden_size=96,
    head_dim=16,
    layers=(transformer_layer(num_attention_heads=8, num_query_groups=2, ffn_hidden_size=128),) * 5,
    max_position_embeddings=256,
)
TEACHER = replace(STUDENT, hidden_size=128).with_sizes(ffn_hidden_size=256)
MIXED = replace(STUDENT.layer, feed_forward=Moe(num_experts=4, expert_ffn_hidden_size=32, top_k=2))
WITH_SHARED = replace(MIXED.moe, top_k=3, shared_ffn_hidden_size=48, shared_gate=True)
SHARED = replace(MIXED, feed_forward=WITH_SHARED)
EXPERTS = replace(STUDENT, layers=(STUDENT.layer, MIXED, SHARED, SHARED))
EXPERT_TEACHER = replace(EXPERTS, hidden_size=128)
MAMBA = LayerSpec(
    mixer=Mamba(mamba_num_heads=12, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=3, chunk_size=8),
    feed_forward=None,
)
MIXERS = replace(STUDENT, layers=(MAMBA, STUDENT.layer.without("mixer"), MAMBA))
TIED = replace(STUDENT, tied_embeddings=True)
FP32, BF16 = Precision.FP32, Precision.BF16
TP2, PP2, DP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig()
SP2 = ParallelConfig(tensor=2, sequence_parallel=True)
AGAIN = ParallelConfig(tensor=2, recompute=Recompute.SELECTIVE)
CP2, CP2_AGAIN = ParallelConfig(context=2), ParallelConfig(context=2, recompute=Recompute.FULL)
EP2, EP2_AGAIN = ParallelConfig(expert=2), ParallelConfig(expert=2, recompute=Recompute.FULL)


@pytest.mark.parametrize(
    ("parallel", "spec", "precision", "distributed"),
    [
        pytest.param(TP2, STUDENT, FP32, False, id="TP2"),
        pytest.param(TP2, STUDENT, BF16, False, id="TP2, bf16"),
        pytest.param(SP2, STUDENT, FP32, False, id="TP2 with sequence parallelism"),
        pytest.param(PP2, STUDENT, FP32, False, id="PP2"),
        pytest.param(PP2, TIED, FP32, False, id="PP2, tied"),
        pytest.param(DP2, STUDENT, FP32, False, id="DP2"),
        pytest.param(DP2, STUDENT, BF16, True, id="DP2, distributed optimizer, bf16"),
        pytest.param(AGAIN, STUDENT, FP32, False, id="TP2, MLPs computed again"),
        pytest.param(TP2, EXPERTS, FP32, False, id="TP2, experts"),
        pytest.param(EP2, EXPERTS, FP32, False, id="EP2"),
        pytest.param(EP2_AGAIN, EXPERTS, BF16, True, id="EP2, computed again, distributed optimizer, bf16"),
        pytest.param(CP2, MIXERS, FP32, False, id="CP2, Mamba whose groups are shared"),
        pytest.param(CP2_AGAIN, MIXERS, BF16, False, id="CP2, Mamba computed again, bf16"),
    ],
)
def test_a_step_of_distillation_moves_what_is_estimated(parallel, spec, precision, distributed):
    copies = 2 // parallel.model_parallel_size
    step = Pass(
        parallel=parallel,
        precision=precision,
        micro_batch_size=SAMPLES,
        sequence_length=LENGTH,
        micro_batches=MICRO_BATCHES,
        engine=False,
        gpu=False,
    )
    training = Training(step=step, data_parallel=copies, distributed_optimizer=distributed)
    teacher = EXPERT_TEACHER if spec.has_experts else TEACHER
    if spec is MIXERS:
        teacher = replace(MIXERS, hidden_size=128).with_sizes(mamba_num_heads=24, mamba_num_groups=6)
    for stage, counted in run_on_ranks(2, distill_once, spec, teacher, parallel, precision, distributed):
        expected = Counter()
        for traffic in step_traffic(spec, training, stage, teacher=teacher):
            kind = f"gradient {traffic.collective}" if traffic.split is Split.DATA else str(traffic.collective)
            expected[kind] += traffic.bytes
        assert counted.keys() == expected.keys()
        for kind, size in counted.items():
            if kind.startswith("gradient"):
                assert size == pytest.approx(expected[kind], rel=0.01), "buffers are padded"
            else:
                assert size == expected[kind], kind


def test_what_a_ring_sends():
    """Eight bytes over four ranks: each passes on two bytes, three times to gather and three to add up.

    Of what is for all four ranks each keeps a quarter.
    """
    sent = {kind: Traffic(split=Split.DATA, collective=kind, bytes=8, ranks=4).sent for kind in Collective}
    assert sent == {"all-reduce": 12, "all-gather": 6, "reduce-scatter": 6, "all-to-all": 6, "send": 8}


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_operations_and_checkpoint(precision):
    spec = STUDENT.with_sizes(ffn_hidden_size=384)
    operations, size = run_on_ranks(1, train_once, spec, precision, 2, 256)[0]
    # Blocks of 128 queries multiply three quarters of all pairs, where the estimate counts the causal half: five
    # products back, and in bf16 two forward; torch counts nothing for its fused kernel, which does those in fp32.
    pairs = 512 * 256 * 2 * (5 * 8 * 16)
    blocks = (5 + 2 * (precision is BF16)) * 0.75 * pairs
    assert operations == pytest.approx(512 * training_flops(spec, 256) - 6 * 0.5 * pairs + blocks, rel=0.02)
    assert size == pytest.approx(checkpoint_bytes(spec, precision), rel=0.05)


def test_expert_parallel_traffic_by_hand():
    """Two layers of 4 experts on 2 ranks: forward, backward, and the teacher's forward pass, from the formulas.

    A gather holds the tokens of both ranks, `2 t h` numbers, and their weights, `2 t e` in fp32; what comes back is
    scattered. Of either a rank sends half.
    """
    tokens, element = SAMPLES * LENGTH, 2
    step = Pass(
        parallel=EP2,
        precision=BF16,
        micro_batch_size=SAMPLES,
        sequence_length=LENGTH,
        micro_batches=MICRO_BATCHES,
        engine=False,
    )
    spec, teacher = (replace(each, layers=each.layers[1:3]) for each in (EXPERTS, EXPERT_TEACHER))
    found = [
        each
        for each in step_traffic(spec, Training(step=step, data_parallel=2), 0, teacher=teacher)
        if each.split is Split.EXPERT
    ]
    states, wide, weights = 2 * tokens * 96 * element, 2 * tokens * 128 * element, 2 * tokens * 4 * 4
    layer = {"all-gather": 2 * states + weights, "reduce-scatter": 2 * states + weights}
    of_teacher = {"all-gather": wide + weights, "reduce-scatter": wide}
    moved: Counter[str] = Counter()
    for each in found:
        assert each.ranks == 2
        moved[each.collective] += each.bytes
    assert moved == {kind: MICRO_BATCHES * 2 * (layer[kind] + of_teacher[kind]) for kind in of_teacher}
    assert sum(each.sent for each in found) == sum(moved.values()) / 2
