"""Estimated memory against what real models and a real step hold."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_minitron.arch.spec import Activation, LayerSpec, ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.estimate.memory import Training, rank_parameters, training_memory
from tests.ranks import run_on_ranks

SPEC = ModelSpec(
    family="llama",
    vocab_size=384,
    hidden_size=96,
    head_dim=16,
    layers=(LayerSpec(num_attention_heads=8, num_query_groups=2, ffn_hidden_size=256),) * 5,
    max_position_embeddings=256,
)
TOKENS = 128


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


def measured(spec: ModelSpec, precision: Precision) -> dict[str, int]:
    """Bytes that one step of plain training holds, by kind, on one rank."""
    from nemo_minitron.megatron import forward, optim, runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch
    from nemo_minitron.models.losses import LanguageModelLoss

    here = runtime.start(ParallelConfig(), seed=0)
    chunks = build_chunks(spec, here, precision, seed=0)
    chunks[0].output = "hidden"
    config = OptimizerConfig()
    wrapped = optim.wrap(chunks, config)
    trainer = optim.build_optimizer(wrapped, config, precision, steps=10)
    own = {parameter.data_ptr() for parameter in chunks[0].parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own and tensor.dtype.is_floating_point and storage.nbytes() > 64:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []  # so that no storage is given out twice
    tokens = torch.randint(0, spec.vocab_size, (1, TOKENS))
    batch = MicroBatch.of(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))
    loss: Any = LanguageModelLoss(model=optim.unwrap(wrapped[-1]), vocab_size=spec.vocab_size, tensor_group=None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward.run(wrapped, [batch], loss, runtime=here, forward_only=False)
    trainer.step()
    adam = [state for each in optim._torch_adams(trainer.optimizer) for state in each.state.values()]
    moments = sum(state[name].nbytes for state in adam for name in ("exp_avg", "exp_avg_sq"))
    masters = 0
    if precision is Precision.BF16:
        masters = sum(parameter.numel() * 4 for parameter in chunks[0].parameters())
    runtime.stop()
    return {
        "weights": sum(parameter.nbytes for parameter in chunks[0].parameters()),
        "gradients": sum(parameter.main_grad.nbytes for parameter in chunks[0].parameters()),
        "optimizer": moments + masters,
        "activations and loss": sum(kept.values()),
    }


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("activation", [Activation.SWIGLU, Activation.SQUARED_RELU])
def test_a_real_step_holds_what_is_estimated(precision, activation):
    spec = replace(SPEC, activation=activation)
    found = run_on_ranks(1, measured, spec, precision)[0]
    training = Training(
        parallel=ParallelConfig(),
        data_parallel=1,
        precision=precision,
        optimizer=OptimizerConfig(),
        micro_batch_size=1,
        sequence_length=TOKENS,
        micro_batches=1,
        engine=False,
    )
    estimate = training_memory(spec, training, 0)
    assert found["weights"] == estimate.weights
    assert found["gradients"] == pytest.approx(estimate.gradients, rel=0.01)  # buffers are padded
    assert found["optimizer"] == estimate.optimizer
    # Chunks of logits live in a reused buffer that autograd does not see.
    element = 2 if precision is Precision.BF16 else 4
    logits = TOKENS * spec.vocab_size * element
    assert found["activations and loss"] == pytest.approx(estimate.activations + estimate.loss - logits, rel=0.1)


def test_recomputation_and_the_distributed_optimizer_save_what_they_should():
    training = Training(
        parallel=ParallelConfig(pipeline=2),
        data_parallel=4,
        precision=Precision.BF16,
        optimizer=OptimizerConfig(),
        micro_batch_size=1,
        sequence_length=4096,
        micro_batches=8,
    )
    spec = replace(SPEC, layers=SPEC.layers * 8)
    plain = training_memory(spec, training, 0)
    lean = training_memory(spec, replace(training, recompute=True), 0)
    split = training_memory(spec, replace(training, optimizer=OptimizerConfig(distributed=True)), 0)
    assert lean.activations < 0.2 * plain.activations
    assert split.optimizer * 4 == plain.optimizer
    assert (lean.weights, split.activations) == (plain.weights, plain.activations)
