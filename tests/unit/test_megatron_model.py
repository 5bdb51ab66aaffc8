"""One rank: logits are transformers', models of any layer sizes build, and bf16 trains."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nemo.core.optim.lr_scheduler import CosineAnnealing
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nemo_minitron.arch.families import family_of_hf_config
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec, RopeScaling
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig, Schedule
from nemo_minitron.errors import LayoutError, TrainingError
from nemo_minitron.megatron import optim, runtime, sharded_io
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import LossResult, MicroBatch, collect_hidden, reduce_report, run
from nemo_minitron.megatron.model import MinitronGPT, rotary_frequencies
from nemo_minitron.megatron.runtime import Runtime
from tests.hf_weights import canonical_weights
from tests.tiny import ZERO_CENTRED

SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama, scaled rotary": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama, linear rotary": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LINEAR)),
    "qwen2, yarn": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_parameters=YARN)),
    "qwen3, yarn": (Qwen3ForCausalLM, Qwen3Config(**SIZES, rope_parameters=YARN | {"attention_factor": 0.8})),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "mistral, window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=7)),
    "nemotron": (NemotronForCausalLM, NemotronConfig(**SIZES)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SIZES, pad_token_id=0)),
    "gemma": (GemmaForCausalLM, GemmaConfig(**SIZES)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SIZES,
            sliding_window=7,
            query_pre_attn_scalar=12,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}
SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=24,
    head_dim=8,
    layers=(transformer_layer(num_attention_heads=6, num_query_groups=2, ffn_hidden_size=36),) * 2,
    max_position_embeddings=128,
)


def random_model(name: str) -> tuple[PreTrainedModel, ModelSpec]:
    kind, config = MODELS[name]
    torch.manual_seed(3)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale_of_norm = parameter.ndim == 1 and config.model_type not in ZERO_CENTRED
            parameter.normal_(1.0 if scale_of_norm else 0.0, 0.2)
    data = config.to_dict()
    return model, family_of_hf_config(data).read_config(data)


def fill(model: MinitronGPT, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for weight, parameter in model.named_weights():
            parameter.copy_(weights[weight.name])


def batch(samples: int = 2, length: int = 17) -> MicroBatch:
    generator = torch.Generator().manual_seed(samples)
    tokens = torch.randint(0, 64, (samples, length + 1), generator=generator)
    return MicroBatch.of(tokens[:, :-1], tokens[:, 1:], torch.ones(samples, length, dtype=torch.bool))


def cross_entropy(logits: torch.Tensor, micro: MicroBatch, index: int) -> LossResult:
    per_token = torch.nn.functional.cross_entropy(logits.mT.float(), micro.labels, reduction="none")
    return LossResult((per_token * micro.keep).sum(), micro.keep.sum(), {"index": torch.tensor(float(index))})


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name: str, here: Runtime) -> None:
    theirs, spec = random_model(name)
    family = family_of_hf_config(theirs.config.to_dict())
    ours = build_chunks(spec, here, Precision.FP32)[0]
    packed = canonical_weights(theirs.state_dict(), spec, family)
    fill(ours, packed)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameter_count(spec)
    micro = batch(length=50)  # beyond the scaled rotary's original 32 positions
    logits = ours(micro.tokens, micro.position_ids, None)
    expected = theirs(micro.tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    logits.backward(direction)
    expected.backward(direction)
    gradients = {parameter: value.grad for parameter, value in theirs.named_parameters()}
    if spec.tied_embeddings:
        gradients["lm_head.weight"] = gradients["model.embed_tokens.weight"]
    for (weight, parameter), wanted in zip(
        ours.named_weights(),
        [canonical_weights(gradients, spec, family)[weight.name] for weight, _ in ours.named_weights()],
        strict=True,
    ):
        # Gradients are sums over 100 positions of either sign; the largest are of order ten.
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=1e-4, atol=3e-4, msg=lambda t, w=weight: f"{w.name} {t}"
        )


def test_hidden_states_times_output_weight_are_the_logits(here: Runtime) -> None:
    for tied in (False, True):
        model = build_chunks(replace(SPEC, tied_embeddings=tied), here, Precision.FP32, seed=1)[0]
        micro = batch()
        (states,) = collect_hidden([model], [micro], here)
        assert not states.requires_grad
        assert model.output == "logits"
        logits = model(micro.tokens, micro.position_ids, None)
        torch.testing.assert_close((states @ model.output_weight().T).transpose(0, 1), logits, rtol=1e-5, atol=1e-6)


def test_rotary_frequencies_at_the_edges() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    plain = rotary_frequencies(replace(SPEC, head_dim=64, rotary_base=1e4))
    scaled = rotary_frequencies(replace(SPEC, head_dim=64, rotary_base=1e4, rope_scaling=scaling))
    wavelengths = 2 * math.pi / plain
    torch.testing.assert_close(scaled[wavelengths < 16], plain[wavelengths < 16])
    torch.testing.assert_close(scaled[wavelengths > 64], plain[wavelengths > 64] / 8)
    between = (wavelengths > 16) & (wavelengths < 64)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_layers_of_different_sizes(here: Runtime, tmp_path: Path) -> None:
    layers = tuple(
        transformer_layer(num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=ffn)
        for heads, groups, ffn in ((6, 2, 36), (2, 1, 12), (3, 3, 20))
    )
    spec = replace(SPEC, layers=layers)
    model = build_chunks(spec, here, Precision.FP32, seed=1)[0]
    assert {weight.name: tuple(parameter.shape) for weight, parameter in model.named_weights()} == {
        weight.name: weight.shape for weight, _ in model.named_weights()
    }
    sharded_io.save_weights([model], tmp_path)
    again = build_chunks(spec, here, Precision.FP32)[0]
    sharded_io.load_weights([again], tmp_path)
    micro = batch()
    first, second = (each(micro.tokens, micro.position_ids, None) for each in (model, again))
    assert torch.equal(first, second)


def test_a_model_without_weights_cannot_pass_for_one_with(here: Runtime) -> None:
    model = build_chunks(SPEC, here, Precision.FP32)[0]
    micro = batch()
    assert model(micro.tokens, micro.position_ids, None).isnan().all()


def test_random_weights_follow_the_seed(here: Runtime) -> None:
    first, again, other = (build_chunks(SPEC, here, Precision.FP32, seed=seed)[0] for seed in (1, 1, 2))
    weight = first.embedding.word_embeddings.weight
    assert torch.equal(weight, again.embedding.word_embeddings.weight)
    assert not torch.equal(weight, other.embedding.word_embeddings.weight)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (first.decoder.final_layernorm.weight == 1).all()


def test_bf16_trains_with_fp32_master_weights(here: Runtime) -> None:
    chunks = build_chunks(SPEC, here, Precision.BF16, seed=1)
    before = chunks[0].embedding.word_embeddings.weight.clone()
    # Steps far below bf16's resolution near 0.02 only add up in fp32.
    config = OptimizerConfig(lr=2e-5, min_lr=2e-5, warmup_steps=0, weight_decay=0.0, schedule=Schedule.CONSTANT)
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.build_optimizer(wrapped, config, Precision.BF16, 40)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        sums = reduce_report(run(wrapped, [batch()], cross_entropy, runtime=here, forward_only=False), here)
        losses.append(sums["total"] / sums["tokens"])
        optimizer.step()
    assert losses[-1] < losses[0]
    assert chunks[0].embedding.word_embeddings.weight.dtype is torch.bfloat16
    assert not torch.equal(before, chunks[0].embedding.word_embeddings.weight)


def test_gradients_that_are_not_finite_change_nothing(here: Runtime) -> None:
    chunks = build_chunks(SPEC, here, Precision.FP32, seed=1)
    config = OptimizerConfig(warmup_steps=0)
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.build_optimizer(wrapped, config, Precision.FP32, 4)
    before = [parameter.clone() for parameter in chunks[0].parameters()]

    def broken(logits: torch.Tensor, micro: MicroBatch, index: int) -> LossResult:
        return LossResult(logits.sum() * torch.nan, micro.keep.sum())

    optimizer.zero_grad()
    run(wrapped, [batch()], broken, runtime=here, forward_only=False)
    info = optimizer.step()
    assert info.skipped
    assert math.isnan(info.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))


@pytest.mark.parametrize("schedule", list(Schedule))
def test_learning_rates(schedule: Schedule, here: Runtime) -> None:
    chunks = build_chunks(SPEC, here, Precision.FP32, seed=1)
    config = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule=schedule, decay_fraction=0.5)
    optimizer = optim.build_optimizer(optim.wrap(chunks, config), config, Precision.FP32, 6)
    rates = []
    for _ in range(6):
        optimizer.zero_grad()
        rates.append(optimizer.step().lr)
    progress = [0.25, 0.5, 0.75, 1.0]
    falling = {
        Schedule.COSINE: [0.2 + 0.8 * (1 + math.cos(math.pi * x)) / 2 for x in progress],
        Schedule.LINEAR: [1.0 - 0.8 * x for x in progress],
        Schedule.WSD: [1.0, 1.0 - 0.8 / 3, 1.0 - 1.6 / 3, 0.2],  # the last three of six steps go down
        Schedule.CONSTANT: [1.0] * 4,
    }[schedule]
    assert rates == pytest.approx([0.5, 1.0, *falling])
    assert optimizer.steps_taken == 6


def test_the_last_steps_may_stay_at_the_minimum_as_in_nemo(here: Runtime) -> None:
    """The expected rates are those of NeMo's own scheduler."""
    chunks = build_chunks(SPEC, here, Precision.FP32, seed=1)
    config = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2)
    optimizer = optim.build_optimizer(optim.wrap(chunks, config), config, Precision.FP32, 9, constant_steps=3)
    rates = []
    for _ in range(9):
        optimizer.zero_grad()
        rates.append(optimizer.step().lr)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    theirs = CosineAnnealing(plain, warmup_steps=2, constant_steps=3, max_steps=9, min_lr=0.2)
    expected = []
    for _ in range(9):
        plain.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    assert rates[1:] == pytest.approx(expected[1:])  # NeMo's warm-up begins above zero
    assert rates[-3:] == [0.2] * 3


def test_weight_decay_spares_norms_and_clipping_limits_the_norm(here: Runtime) -> None:
    chunks = build_chunks(SPEC, here, Precision.FP32, seed=1)
    config = OptimizerConfig(lr=0.1, min_lr=0.1, warmup_steps=0, weight_decay=0.5, schedule=Schedule.CONSTANT)
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.build_optimizer(wrapped, config, Precision.FP32, 2)
    matrix, norm = chunks[0].output_layer.weight, chunks[0].decoder.final_layernorm.weight
    before = matrix.clone(), norm.clone()
    optimizer.zero_grad()
    optimizer.step()  # zero gradients: decay alone moves weights
    torch.testing.assert_close(matrix, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(norm, before[1])


def test_micro_batches_must_agree_in_shape(here: Runtime) -> None:
    model = build_chunks(SPEC, here, Precision.FP32, seed=1)
    for micro_batches in ([], [batch(), batch(length=9)]):
        with pytest.raises(TrainingError, match="shape"):
            run(model, micro_batches, cross_entropy, runtime=here, forward_only=True)


def test_reports_are_summed(here: Runtime) -> None:
    model = build_chunks(SPEC, here, Precision.FP32, seed=1)
    reports = run(model, [batch()] * 3, cross_entropy, runtime=here, forward_only=True)
    assert [report["index"].item() for report in reports] == [0, 1, 2]
    sums = reduce_report(reports, here)
    assert sums["index"] == 3
    assert sums["tokens"] == 3 * 2 * 17
    assert reduce_report([], here) == {}


def test_context_parallel_ranks_take_a_piece_from_either_end() -> None:
    micro = batch(1, 8)
    pieces = [micro.on_context_rank(rank, 2).position_ids[0].tolist() for rank in range(2)]
    assert pieces == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_context_parallelism_needs_transformer_engine() -> None:
    pretended = runtime.start(ParallelConfig(), seed=0)
    wanted = replace(pretended, parallel=ParallelConfig(context=2))
    with pytest.raises(LayoutError, match="Transformer Engine"):
        build_chunks(SPEC, wanted, Precision.FP32)
    runtime.stop()
