"""Estimated memory against what real models hold, and what a real step allocates."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import Activation, ModelSpec, Norm
from nemo_minitron.config.hidden import HiddenConfig
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.estimate.activations import Pass
from nemo_minitron.estimate.memory import RankMemory, Training, rank_parameters, training_memory
from tests.ranks import run_on_ranks

SPEC = ModelSpec(
    vocab_size=1024,
    hidden_size=256,
    head_dim=32,
    layers=(transformer_layer(num_attention_heads=8, num_query_groups=2, ffn_hidden_size=640),) * 8,
    max_position_embeddings=512,
)
TEACHER = replace(SPEC, hidden_size=384)
TOKENS = 256


class Case(NamedTuple):
    """A real step, and what is estimated of it."""

    spec: ModelSpec = SPEC
    parallel: ParallelConfig = ParallelConfig()
    precision: Precision = Precision.FP32
    teacher: ModelSpec | None = None
    micro_batches: int = 1
    hidden: HiddenConfig | None = None

    def estimate(self, stage: int) -> RankMemory:
        step = Pass(
            parallel=self.parallel,
            precision=self.precision,
            micro_batch_size=1,
            sequence_length=TOKENS,
            micro_batches=self.micro_batches,
            engine=False,
            gpu=False,
        )
        training = Training(step=step, data_parallel=1, teacher_precision=self.precision)
        if self.hidden is not None:
            compared, _ = self.hidden.states(self.teacher.num_layers, self.spec.num_layers)
            training = replace(training, compared=compared, projection=True)
        return training_memory(self.spec, training, stage, teacher=self.teacher)


def held_parameters(spec: ModelSpec, parallel: ParallelConfig) -> tuple[int, int]:
    """Pipeline stage of this rank, and the parameters it holds."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks

    here = runtime.start(parallel, seed=0)
    chunks = build_chunks(spec, here, Precision.FP32, seed=0)
    found = here.pp_rank, sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    runtime.stop()
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_every_rank(tied):
    spec = replace(SPEC, tied_embeddings=tied, vocab_size=381)  # padded under tensor parallelism
    parallel = ParallelConfig(tensor=2, pipeline=2)
    for stage, parameters in run_on_ranks(4, held_parameters, spec, parallel):
        assert sum(rank_parameters(spec, parallel, stage)) == parameters


def measured(case: Case) -> tuple[dict[str, int], RankMemory]:
    """Bytes on this rank: what is held before a step, and the most that is allocated at one time while it runs.

    The estimate is made here as well: blocks of the loss depend on the threads of the process.
    """
    from nemo_minitron.megatron import forward, optim, runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch
    from nemo_minitron.models.hidden import StateMatching
    from nemo_minitron.models.losses import DistillationLoss, LanguageModelLoss, tensor_group
    from nemo_minitron.parallel.fused_linear import WORKSPACE

    here = runtime.start(case.parallel, seed=0)
    chunks = build_chunks(case.spec, here, case.precision, seed=0)
    teacher = [] if case.teacher is None else build_chunks(case.teacher, here, case.precision, trainable=False, seed=1)
    for chunk in (*chunks, *teacher):
        chunk.output = "hidden"
    config = OptimizerConfig()
    wrapped = optim.wrap(chunks, config)
    for parameter in chain.from_iterable(chunk.parameters() for chunk in chunks):
        parameter.gradient_through_autograd = True  # as on a GPU, which the estimate is for
    trainer = optim.build_optimizer(wrapped, config, case.precision, steps=10)
    tokens = torch.randint(0, case.spec.vocab_size, (1, TOKENS))
    batch = MicroBatch.of(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))
    batches = [batch] * case.micro_batches

    matching = None
    if case.hidden is not None:
        sizes = {"student": case.spec, "teacher": case.teacher}
        matching = StateMatching(case.hidden, **sizes, runtime=here, optimizer=config)

    def gradients() -> None:
        trainer.zero_grad()
        if matching is not None:
            matching.projection.grad = None
        shared: dict[str, Any] = {"vocab_size": case.spec.vocab_size, "tensor_group": tensor_group(here)}
        loss: Any = LanguageModelLoss(model=chunks[-1], **shared)
        if teacher:
            with matching.capture_teacher(teacher) if matching else nullcontext():
                states = forward.collect_hidden(teacher, batches, here)
            if matching is not None:
                matching.send_targets(batches, chunks[0].config.params_dtype)
            loss = DistillationLoss(student=chunks[-1], teacher=teacher[-1], teacher_states=states, **shared)
        with matching.match(chunks, weight=1.0) if matching else nullcontext():
            forward.run(wrapped, batches, loss, runtime=here, forward_only=False)

    gradients()  # what the first step alone allocates and keeps
    WORKSPACE.clear()
    peak = peak_of(gradients)
    workspace = sum(buffer.nbytes for buffer in WORKSPACE._buffers.values())
    trainer.step()
    moments = [state for adam in optim._torch_adams(trainer.optimizer) for state in adam.state.values()]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    masters = 4 * sum(parameter.numel() for parameter in parameters) if case.precision is Precision.BF16 else 0
    if matching is not None:
        matching.step(tokens=TOKENS, lr=1e-4, skipped=False)
        moments += matching._optimizer.state.values()
        masters += matching.projection.nbytes
    held = {
        "stage": here.pp_rank,
        "weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.main_grad.nbytes for parameter in parameters),
        "optimizer": masters + sum(state[name].nbytes for state in moments for name in ("exp_avg", "exp_avg_sq")),
        "teacher": sum(parameter.nbytes for chunk in teacher for parameter in chunk.parameters()),
        "peak": peak,
        "workspace": workspace,
    }
    runtime.stop()
    return held, case.estimate(here.pp_rank)


def peak_of(work: Any) -> int:
    """Most bytes of CPU memory that `work` has allocated at one time, by PyTorch's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


HIDDEN = HiddenConfig(layers=((1, 1), (-3, -2), (-1, -1)), embedding=True)
BF16, PIPELINE = Precision.BF16, ParallelConfig(pipeline=2)
LAYERNORM = replace(SPEC, activation=Activation.SQUARED_RELU, norm=Norm.LAYERNORM1P)
CASES = {
    "plain": Case(),
    "plain in bf16": Case(precision=BF16),
    "squared relu": Case(spec=LAYERNORM),
    "normed heads": Case(spec=replace(SPEC, qk_norm=True)),
    "teacher": Case(teacher=TEACHER),
    "teacher in bf16": Case(teacher=TEACHER, precision=BF16),
    "selective": Case(parallel=ParallelConfig(recompute=Recompute.SELECTIVE)),
    "full": Case(parallel=ParallelConfig(recompute=Recompute.FULL)),
    "full in bf16": Case(parallel=ParallelConfig(recompute=Recompute.FULL), precision=BF16),
    "two tensor ranks": Case(parallel=ParallelConfig(tensor=2), teacher=TEACHER),
    "two tensor ranks in bf16": Case(parallel=ParallelConfig(tensor=2), teacher=TEACHER, precision=BF16),
    "two pipeline stages": Case(parallel=PIPELINE, teacher=TEACHER, micro_batches=4),
    "two pipeline stages in bf16": Case(parallel=PIPELINE, teacher=TEACHER, micro_batches=4, precision=BF16),
    "hidden states": Case(teacher=TEACHER, hidden=HIDDEN),
    "hidden states on two stages": Case(parallel=PIPELINE, teacher=TEACHER, micro_batches=4, hidden=HIDDEN),
    "hidden states in bf16": Case(teacher=TEACHER, hidden=HIDDEN, precision=BF16),
    "interleaved": Case(parallel=ParallelConfig(pipeline=2, virtual_pipeline=2), micro_batches=4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_real_step_allocates_what_is_estimated(case):
    for found, estimate in run_on_ranks(case.parallel.model_parallel_size, measured, case):
        states = estimate.teacher - found["teacher"]
        assert found["weights"] == estimate.weights
        assert found["gradients"] == pytest.approx(estimate.gradients, rel=0.01)  # buffers are padded
        assert found["optimizer"] == estimate.optimizer
        if case.teacher is not None:
            is_last = found["stage"] == case.parallel.pipeline - 1
            element = 2 if case.precision is BF16 else 4
            every = case.micro_batches * TOKENS * TEACHER.hidden_size * element
            compared = 0 if case.hidden is None else 4 if case.parallel == ParallelConfig() else 2
            assert states == (is_last + compared) * every
        expected = estimate.activations + estimate.loss + states
        least = expected
        if case.parallel.recompute is not Recompute.NONE:
            # The peak is in a layer's backward pass, and the chunk of logits, which the estimate adds to it, is gone.
            # What is left of the loss are its reused buffers: all, or, where oneDNN brings its own memory, few.
            least = estimate.activations + states + found["workspace"]
        assert 0.9 * least <= found["peak"] <= 1.1 * expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("virtual", [None, 2])
def test_a_model_on_meta_has_the_parameters_of_the_table_and_no_memory(tied, virtual):
    from nemo_minitron.megatron.meta import build_on_meta

    spec = replace(SPEC, tied_embeddings=tied, vocab_size=381)
    parallel = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=virtual, context=2, sequence_parallel=True)
    for stage in range(2):
        parameters = [p for chunk in build_on_meta(spec, parallel, stage, BF16) for p in chunk.parameters()]
        assert {p.device.type for p in parameters} == {"meta"}
        assert sum(p.numel() for p in parameters) == sum(rank_parameters(spec, parallel, stage))


def test_the_distributed_optimizer_and_an_offloaded_teacher_save_what_they_should():
    training = Training(
        step=Pass(
            parallel=ParallelConfig(pipeline=2),
            precision=BF16,
            micro_batch_size=1,
            sequence_length=4096,
            micro_batches=8,
        ),
        data_parallel=4,
    )
    plain = training_memory(SPEC, training, 0, teacher=TEACHER)
    split = training_memory(SPEC, replace(training, distributed_optimizer=True), 0, teacher=TEACHER)
    lent = training_memory(SPEC, replace(training, offload_teacher=True), 0, teacher=TEACHER)
    assert split.optimizer * 4 == plain.optimizer
    assert (split.weights, split.activations) == (plain.weights, plain.activations)
    assert plain.teacher == 2 * sum(rank_parameters(TEACHER, training.step.parallel, 0))
    assert lent.teacher == 2 * TEACHER.vocab_size * TEACHER.hidden_size  # the embedding stays


@pytest.mark.parametrize("engine", [False, True])
def test_recomputation_saves_activations(engine):
    step = Pass(
        parallel=ParallelConfig(),
        precision=BF16,
        micro_batch_size=1,
        sequence_length=4096,
        micro_batches=1,
        engine=engine,
        gpu=engine,
    )
    deep = replace(SPEC, layers=SPEC.layers * 4)
    none, selective, full = (
        training_memory(deep, Training(step=step.recomputing(kind), data_parallel=1), 0) for kind in Recompute
    )
    assert full.activations < 0.2 * none.activations
    assert full.activations < selective.activations < 0.8 * none.activations
