"""What communication is hidden, against arithmetic done by hand for a small model with round numbers."""

from dataclasses import replace

import pytest

from nemo_minitron.arch.layer import LayerSpec, Mamba, Moe, transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.hf import read_architecture
from nemo_minitron.cli import dry_run_tables, recipes
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.estimate.activations import Pass
from nemo_minitron.estimate.communication import Split
from nemo_minitron.estimate.memory import Training
from nemo_minitron.estimate.overlap import Machine, communication, gathers_overlap, gradients_overlap
from nemo_minitron.estimate.work import work_of
from nemo_minitron.pruning.rounds import round_specs

# 2 layers of 1024 channels: qkv 3 x 1024^2, projection 1024^2, gated MLP 3 x 1024 x 4096; five norms in all.
SPEC = ModelSpec(
    vocab_size=32768,
    hidden_size=1024,
    head_dim=128,
    layers=(transformer_layer(num_attention_heads=8, num_query_groups=8, ffn_hidden_size=4096),) * 2,
    max_position_embeddings=4096,
)
LAYER, VOCABULARY = 16 * 2**20, 32 * 2**20
PARAMETERS = 2 * LAYER + 5 * 1024 + 2 * VOCABULARY
LENGTH, MICRO_BATCHES = 4096, 4
MACHINE = Machine(gpu="h100", gpus=32, gpus_per_node=8, mfu=0.5)
RATE, WIRE = 989e12 * 0.5, 50e9 * 0.7
# A token: two operations per weight, and 4 a channel and each of 2048 positions on average.
LAYER_FLOPS = 2 * LAYER + 4 * 1024 * 2048
PASS = LENGTH * (2 * LAYER_FLOPS + 2 * VOCABULARY) / RATE


def training(parallel: ParallelConfig, copies: int, *, distributed: bool = True, gpu: bool = True) -> Training:
    step = Pass(
        parallel=parallel,
        precision=Precision.BF16,
        micro_batch_size=1,
        sequence_length=LENGTH,
        micro_batches=MICRO_BATCHES,
        engine=gpu,
        gpu=gpu,
    )
    return Training(step=step, data_parallel=copies, distributed_optimizer=distributed)


def ring(size: float, ranks: int) -> float:
    return size * (ranks - 1) / ranks / WIRE


def test_gradients_pass_behind_the_backward_pass_but_for_the_last_bucket():
    """40 million of 97 M parameters are in the bucket that is complete when the pass ends; 4 bytes each, scattered."""
    (found,) = {communication(SPEC, training(ParallelConfig(overlap_param_gather=False), 32), 0, MACHINE)[Split.DATA]}
    gradients, weights = ring(4 * PARAMETERS, 32), ring(2 * PARAMETERS, 32)
    bucket = 40e6 / PARAMETERS
    assert gradients * (1 - bucket) > 2 * PASS, "the pass is shorter than they take"
    assert found.hidden == pytest.approx(2 * PASS, rel=1e-6)
    assert found.exposed == pytest.approx(gradients + weights - 2 * PASS, rel=1e-6)


def test_weights_pass_behind_the_forward_pass_and_the_first_bucket_behind_the_teacher_s():
    fast = replace(MACHINE, mfu=0.05)  # ten times the time to hide them behind
    forward = 10 * PASS
    gradients, weights = ring(4 * PARAMETERS, 32), ring(2 * PARAMETERS, 32)
    bucket = 40e6 / PARAMETERS
    assert weights < forward
    alone = communication(SPEC, training(ParallelConfig(), 32), 0, fast)[Split.DATA]
    assert alone.exposed == pytest.approx(bucket * (gradients + weights), rel=1e-6)
    taught = communication(SPEC, training(ParallelConfig(), 32), 0, fast, teacher=SPEC)[Split.DATA]
    assert taught.exposed == pytest.approx(bucket * gradients, rel=1e-6)
    assert taught.seconds == pytest.approx(gradients + weights, rel=1e-6)


def test_the_second_pipeline_stage_has_one_bucket_and_the_time_for_which_it_waits():
    """A layer, the final norm and the output layer; it ends its last backward pass one pass before the first stage."""
    parallel, own = ParallelConfig(pipeline=2), LAYER + 3 * 1024 + VOCABULARY
    found = communication(SPEC, training(parallel, 16), 1, MACHINE)
    forward = LENGTH * (LAYER_FLOPS + 2 * VOCABULARY) / RATE
    gradients, weights = ring(4 * own, 16), ring(2 * own, 16)
    assert gradients > 2 * forward
    assert weights > forward
    assert found[Split.DATA].hidden == pytest.approx(3 * forward, rel=1e-6)
    assert found[Split.DATA].exposed == pytest.approx(gradients + weights - 3 * forward, rel=1e-6)
    states = 2 * LENGTH * 1024 * MICRO_BATCHES  # gradients to the first stage, bf16
    assert found[Split.PIPELINE] == (0, pytest.approx(states / WIRE, rel=1e-6))


def test_the_interleaved_schedule_hides_sends_but_for_those_that_fill_the_pipeline():
    """Two chunks of a layer a stage, four micro-batches: one of eight rounds fills the pipeline."""
    deep = replace(SPEC, layers=SPEC.layers * 2)
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    sends = communication(deep, training(parallel, 16), 1, MACHINE)[Split.PIPELINE]
    states = (1 + 2) * 2 * LENGTH * 1024 * MICRO_BATCHES / WIRE
    assert sends == pytest.approx((states * 7 / 8, states / 8), rel=1e-6)
    plain = parallel.model_copy(update={"overlap_p2p_comm": False})
    assert communication(deep, training(plain, 16), 1, MACHINE)[Split.PIPELINE] == pytest.approx((0, states), rel=1e-6)


def test_tensor_parallel_ranks_of_one_node_use_nvlink_and_nothing_is_hidden():
    """Two sums per layer and direction and one of the embedding, in bf16; the loss's gradient of the states in fp32."""
    found = communication(SPEC, training(ParallelConfig(tensor=2), 16), 0, MACHINE)[Split.TENSOR]
    states = LENGTH * 1024 * MICRO_BATCHES
    assert found == (0, pytest.approx((9 * 2 + 4) * states / (450e9 * 0.7), rel=1e-6))


@pytest.mark.parametrize(("ranks", "wire"), [(8, 450e9), (16, 50e9)])
def test_experts_exchange_tokens_over_nvlink_inside_a_node_and_nothing_is_hidden(ranks, wire):
    """Of two layers: tokens of all ranks and their 16 weights gathered, sums scattered, and the other way back."""
    experts = replace(SPEC.layer, feed_forward=Moe(num_experts=16, expert_ffn_hidden_size=512, top_k=2))
    spec = replace(SPEC, layers=(experts,) * 2)
    found = communication(spec, training(ParallelConfig(expert=ranks), 16), 0, MACHINE)[Split.EXPERT]
    states, weights = 2 * LENGTH * 1024, 4 * LENGTH * 16
    sent = (ranks - 1) * 2 * MICRO_BATCHES * (4 * states + 2 * weights)
    assert found == (0, pytest.approx(sent / (wire * 0.7), rel=1e-6))


@pytest.mark.parametrize(
    ("recipe", "key", "ranks", "header"),
    [
        ("qwen3_30b_a3b_to_22b_width_64gpu_h100", "expert", 8, "EP"),
        ("nemotron_h_8b_to_4b_width_256gpu_h100", "context", 2, "CP of\nMamba"),
    ],
)
def test_the_dry_run_shows_expert_and_context_parallelism_where_there_is_some(recipe, key, ranks, header):
    path = recipes.find(recipe)
    for size, named in ((ranks, True), (1, False)):
        config = load_recipe(path, [f"parallel.{key}={size}"])
        teacher = read_architecture(path.parent / config.model.architecture)
        students = round_specs(config.target, teacher, config.rounds)
        work = work_of("distill", 1, config, teacher, students, ranks=config.cluster.gpus)
        table = dry_run_tables.communication({"distill": work}, config)
        cells = {column.header: next(iter(column.cells)) for column in table.columns}
        assert (header in cells) == named
        assert not named or float(cells[header]) > 0


@pytest.mark.parametrize(("tensor", "wire"), [(2, 450e9), (4, 50e9)])
def test_mamba_exchanges_positions_over_nvlink_inside_a_node_and_nothing_is_hidden(tensor, wire):
    """Of two layers: x, the maps of 8 / TP groups, each for one rank or two, a step a head; back what is like x."""
    parallel = ParallelConfig(tensor=tensor, context=4)
    mamba = Mamba(mamba_num_heads=32, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=8)
    spec = replace(SPEC, layers=(LayerSpec(mixer=mamba, feed_forward=None),) * 2)
    found = communication(spec, training(parallel, 4), 0, MACHINE)[Split.CONTEXT]
    copies = {2: 1, 4: 2}[tensor]
    numbers = (2 * 32 * 64 + 2 * copies * 8 * 128 + 32) / tensor
    sent = 2 * MICRO_BATCHES * 2 * (3 / 4) * (LENGTH / 4) * numbers * 2
    assert found == (0, pytest.approx(sent / (wire * 0.7), rel=1e-6))


@pytest.mark.parametrize(
    ("settings", "copies", "how", "expected"),
    [
        ({}, 4, {}, (True, True)),
        ({}, 1, {}, (False, False)),
        ({}, 4, {"distributed": False}, (True, False)),
        ({}, 4, {"gpu": False}, (False, False)),
        ({"overlap_grad_reduce": False}, 4, {}, (False, False)),
        ({"overlap_param_gather": False}, 4, {}, (True, False)),
        ({"overlap_param_gather": True}, 4, {"gpu": False}, (True, True)),
    ],
)
def test_what_is_reckoned_with_is_what_runs(settings, copies, how, expected):
    planned = training(ParallelConfig(**settings), copies, **how)
    assert (gradients_overlap(planned), gathers_overlap(planned)) == expected


def shown(overrides: list[str]) -> list[float]:
    """Hidden and exposed seconds of the distillation in the dry run's table of the Qwen3 recipe."""
    path = recipes.find("qwen3_8b_to_6b_depth_64gpu_h100")
    config = load_recipe(path, overrides)
    teacher = read_architecture(path.parent / config.model.architecture)
    students = round_specs(config.target, teacher, config.rounds)
    work = work_of("distill", 1, config, teacher, students, ranks=64)
    table = dry_run_tables.communication({"distill": work}, config)
    return [float(next(iter(table.columns[index].cells))) for index in (4, 5)]


def test_the_dry_run_shows_what_switching_overlaps_off_costs():
    on = shown([])
    off = shown(["parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false"])
    assert on[0] > 0
    assert off[0] == 0
    assert sum(off) == pytest.approx(sum(on), abs=0.02)
