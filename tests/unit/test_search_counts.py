"""Costs of shapes: exact, against real built models and the totals that papers publish."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, NemotronConfig, Qwen3Config

from nemo_minitron.arch.families import family_named
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.budget import DeploymentConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.estimate.compute import forward_flops
from nemo_minitron.search.axes import sizes_of
from nemo_minitron.search.measures import limits, measures

NAMES = ("params", "non_embedding_params", "weight_memory", "kv_cache", "flops_per_token")


def spec_of(*, layers=32, hidden=4096, ffn=14336, heads=32, groups=8, vocab=128256, **traits):
    layer = transformer_layer(num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=ffn)
    traits = {"head_dim": 128, "max_position_embeddings": 8192, **traits}
    return ModelSpec(vocab_size=vocab, hidden_size=hidden, layers=(layer,) * layers, **traits)


def random_config(rng: random.Random, kind: type):
    groups = rng.choice([1, 2, 3, 4])
    sizes = {
        "vocab_size": 16 * rng.randint(8, 40),
        "hidden_size": 72 * rng.randint(1, 4),
        "intermediate_size": 8 * rng.randint(2, 40),
        "num_hidden_layers": rng.randint(1, 5),
        "num_attention_heads": groups * rng.randint(1, 3),
        "num_key_value_heads": groups,
        "head_dim": 8 * rng.randint(1, 4),
        "tie_word_embeddings": rng.random() < 0.5,
        "max_position_embeddings": 128,
    }
    return kind(**sizes, attn_implementation="eager")


@pytest.mark.parametrize("number", range(50))
def test_counts_are_those_of_built_models(number):
    """Parameters by numel, cache bytes as allocated, operations as torch counts them, all of one teacher's traits."""
    rng = random.Random(number)
    kind = [LlamaConfig, Qwen3Config, NemotronConfig][number % 3]
    config = random_config(rng, kind)
    batch, length = rng.randint(1, 3), rng.randint(2, 30)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        cache = DynamicCache(config=config)
        model(torch.zeros(batch, length - 1, dtype=torch.int64), past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(batch, 1, dtype=torch.int64), past_key_values=cache)
    spec = family_named(config.model_type).read_config(config.to_dict())
    teacher = spec.with_sizes(num_layers=6, hidden_size=512, ffn_hidden_size=640)
    deployment = DeploymentConfig(batch_size=batch, sequence_length=length)
    found = {name: measure(sizes_of(spec)) for name, measure in measures(teacher, deployment, NAMES).items()}
    tied = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    assert found["params"] == model.num_parameters()
    assert found["non_embedding_params"] == model.num_parameters() - model.model.embed_tokens.weight.numel() - tied
    assert found["weight_memory"] == 2 * model.num_parameters()
    allocated = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert found["kv_cache"] == sum(tensor.numel() * tensor.element_size() for tensor in allocated)
    rotary = 2 * batch * config.head_dim // 2 * (1 if kind is not NemotronConfig else 0)
    counted = counter.get_total_flops()
    assert found["flops_per_token"] * batch == pytest.approx(counted, abs=rotary)


@pytest.mark.parametrize(
    ("shape", "total", "non_embedding"),
    [
        # arXiv:2408.11796, table 3
        ({"hidden": 3072, "ffn": 9216}, "4.5B", "3.7B"),
        ({"layers": 16}, "4.5B", "3.5B"),
        ({"layers": 40, "hidden": 4096, "ffn": 11520, "vocab": 131072}, "8.4B", "7.3B"),
    ],
)
def test_counts_are_those_that_the_paper_publishes(shape, total, non_embedding):
    spec = spec_of(**shape)
    found = measures(spec, DeploymentConfig(), NAMES)
    assert f"{found['params'](sizes_of(spec)) / 1e9:.1f}B" == total
    assert f"{found['non_embedding_params'](sizes_of(spec)) / 1e9:.1f}B" == non_embedding


def test_operations_are_those_of_the_estimates():
    """`forward_flops` averages over positions, so its sequence is twice as long as what one token attends to."""
    spec = spec_of()
    deployment = DeploymentConfig(sequence_length=4096)
    found = measures(spec, deployment, ["flops_per_token"])["flops_per_token"](sizes_of(spec))
    assert found == forward_flops(spec, 2 * 4096)


def test_local_layers_hold_their_window():
    """Four global layers stay first: what is cached is the most it can be."""
    layers = tuple(
        transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, local=index % 3 > 0)
        for index in range(12)
    )
    spec = ModelSpec(
        vocab_size=64,
        hidden_size=32,
        head_dim=8,
        layers=layers,
        max_position_embeddings=128,
        sliding_window=10,
    )
    measure = measures(spec, DeploymentConfig(sequence_length=100), ["kv_cache"])["kv_cache"]
    each = 2 * 2 * 8 * 2  # keys and values, groups, channels, bytes
    assert measure((6, 32, 64, 4, 2)) == (4 * 100 + 2 * 10) * each
    assert measure((3, 32, 64, 4, 2)) == 3 * 100 * each


def test_quantized_weights_and_cache():
    spec = spec_of()
    deployment = DeploymentConfig(dtype="int4", batch_size=3, sequence_length=1000)
    found = measures(spec, deployment, ["weight_memory", "kv_cache"])
    sizes = sizes_of(spec)
    assert found["weight_memory"](sizes) == 8_030_261_248 // 2  # Llama-3.1-8B
    assert found["kv_cache"](sizes) == 3 * 1000 * 32 * 2 * 8 * 128  # a byte each


def test_a_ratio_is_a_number_of_parameters():
    spec = spec_of()
    assert limits(TargetConfig(ratio=0.5), spec) == {"params": 8_030_261_248 // 2}
    assert limits(TargetConfig(ratio=0.5, params="4B"), spec) == {"params": 4_000_000_000}


@pytest.mark.parametrize(
    ("written", "amount"), [("100M", 10**8), ("4.5B", 4_500_000_000), (7, 7), (1e6, 10**6), ("1.5k", 1500)]
)
def test_amounts_have_units(written, amount):
    assert TargetConfig(params=written).params == amount


@pytest.mark.parametrize(
    ("written", "amount"), [("8GB", 8 * 10**9), ("8GiB", 2**33), (512, 512), ("0.3GiB", 322_122_547), ("1.5KiB", 1536)]
)
def test_memory_has_units(written, amount):
    assert TargetConfig(weight_memory=written).weight_memory == amount


def test_every_number_with_one_or_two_decimals_is_taken_by_its_digits():
    """Most of them, times a power of ten in binary floating point, are no integers."""
    for hundredths in range(1, 3000):
        written = f"{hundredths // 100}.{hundredths % 100:02d}"
        assert TargetConfig(params=f"{written}B").params == hundredths * 10**7
        assert TargetConfig(params=f"{written}M").params == hundredths * 10**4
        assert TargetConfig(weight_memory=f"{written}GB").weight_memory == hundredths * 10**7
        assert TargetConfig(weight_memory=f"{written}GiB").weight_memory == hundredths * 2**30 // 100
        if hundredths % 10 == 0:
            assert TargetConfig(params=f"{written[:-1]}B").params == hundredths * 10**7


@pytest.mark.parametrize("written", ["0.0005K", "1.0001K", "0.3B", 0.5, float("inf"), float("nan"), True])
def test_amounts_are_integers(written):
    with pytest.raises(ValueError, match=r"whole number of at least 1|a number, or one with a unit"):
        TargetConfig(weight_memory=written)
