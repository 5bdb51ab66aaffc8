"""Specs, the weight table and NeMo's configuration keys."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from nemo_minitron.arch.families import FAMILIES, family_named, family_of_hf_config
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.nemo_config import nemo_config, spec_from_nemo_config
from nemo_minitron.arch.spec import Activation, ModelSpec, Norm, RopeScaling
from nemo_minitron.arch.weights import parameter_count, part_shapes, weight_named, weights
from nemo_minitron.checkpoints.hf import hf_names
from nemo_minitron.errors import SpecError

LLAMA_31 = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
QWEN2 = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
# Mistral-NeMo: 32 heads of 128 channels are not the hidden size.
MISTRAL = MistralConfig(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=14336,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    sliding_window=None,
)
CONFIGS = pytest.mark.parametrize(
    "config", [LLAMA_31, QWEN2, MISTRAL], ids=["Llama-3.1-8B", "Qwen2-0.5B", "Mistral-NeMo"]
)


def spec_of(config: PreTrainedConfig) -> ModelSpec:
    data = config.to_dict()
    return family_of_hf_config(data).read_config(data)


@CONFIGS
def test_names_and_shapes_are_those_of_transformers(config: PreTrainedConfig) -> None:
    spec = spec_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ours = {}
    for weight in weights(spec):
        ours |= dict(
            zip(hf_names(family_of_hf_config(config.to_dict()), weight), part_shapes(weight, spec), strict=True)
        )
    assert ours == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_count(spec) == sum(parameter.numel() for parameter in model.parameters())


def test_counts_of_published_models() -> None:
    """arXiv:2408.11796, table 3: Llama-3.1-Minitron-4B-Width 4.5B (3.7B without embeddings), Depth 4.5B (3.5B)."""
    teacher = spec_of(LLAMA_31)
    assert parameter_count(teacher) == 8_030_261_248  # model card
    width = teacher.with_sizes(hidden_size=3072, ffn_hidden_size=9216)
    depth = teacher.with_sizes(num_layers=16)
    assert [round(parameter_count(spec) / 1e9, 1) for spec in (width, depth)] == [4.5, 4.5]
    assert [round(parameter_count(spec, embeddings=False) / 1e9, 1) for spec in (width, depth)] == [3.7, 3.5]


def test_head_dim_stays_when_the_hidden_size_shrinks() -> None:
    small = spec_of(LLAMA_31).with_sizes(hidden_size=3072)
    config = family_named("llama").write_config(small)
    assert config["head_dim"] == 128 != 3072 // 32
    assert LlamaConfig(**config).head_dim == 128
    assert weight_named(small, "decoder.layers.0.self_attention.linear_proj.weight").shape == (3072, 4096)


@CONFIGS
def test_config_json_round_trip(config: PreTrainedConfig) -> None:
    spec = spec_of(config)
    written = family_of_hf_config(config.to_dict()).write_config(spec)
    assert family_of_hf_config(written).read_config(written) == spec
    again = type(config)(**written)
    assert again.rope_parameters == config.rope_parameters


def test_a_llama_that_transformers_refuses_is_written_as_a_mistral() -> None:
    """6 heads do not divide 64 channels: LlamaConfig raises, although it has an explicit head_dim."""
    small = spec_of(LLAMA_31).with_sizes(hidden_size=64, num_attention_heads=6, num_query_groups=3)
    config = family_named("llama").write_config(small)
    assert (config["model_type"], config["sliding_window"]) == ("mistral", None)
    again = MistralConfig(**config)
    assert (again.head_dim, again.rope_parameters) == (128, LLAMA_31.rope_parameters)
    assert family_of_hf_config(config).read_config(config) == small


UNEVEN = ModelSpec(
    vocab_size=49152,
    hidden_size=432,
    head_dim=64,
    layers=(
        transformer_layer(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536),
        transformer_layer(num_attention_heads=6, num_query_groups=2, ffn_hidden_size=1000),
    ),
    max_position_embeddings=8192,
    norm_eps=1.3333e-5,
    rotary_base=1e5,
    rope_scaling=RopeScaling(factor=32.0),
    tied_embeddings=True,
    activation=Activation.SQUARED_RELU,
    norm=Norm.LAYERNORM1P,
)
SPECS = [spec_of(LLAMA_31), spec_of(QWEN2), UNEVEN]


@pytest.mark.parametrize("spec", SPECS, ids=["llama", "qwen2", "uneven"])
def test_plain_data_round_trip_through_yaml(spec: ModelSpec) -> None:
    assert ModelSpec.from_dict(yaml.safe_load(yaml.safe_dump(spec.to_dict()))) == spec


@pytest.mark.parametrize("spec", SPECS, ids=["llama", "qwen2", "uneven"])
def test_nemo_config_round_trip_through_yaml(spec: ModelSpec) -> None:
    config = yaml.safe_load(yaml.safe_dump(nemo_config(spec)))
    assert spec_from_nemo_config(config) == spec
    assert not {key for key in config if key.startswith("hidden_") and key not in ("hidden_size", "hidden_dropout")}
    if spec.is_uniform:
        del config["minitron"]
        assert spec_from_nemo_config(config) == spec  # NeMo's own keys say as much


def test_nemo_config_has_the_keys_of_the_official_converter() -> None:
    """Values of convert_llama_hf_to_nemo.py for Llama-3.1-8B."""
    config = nemo_config(spec_of(LLAMA_31))
    expected = {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "normalization": "rmsnorm",
        "layernorm_epsilon": 1e-6,
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": False,
        "position_embedding_type": "rope",
        "rotary_base": 500000.0,
        "rotary_percentage": 1.0,
        "seq_len_interpolation_factor": None,
        "scale_positional_embedding": True,
        "share_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 128,
        "mcore_gpt": True,
        "transformer_engine": True,
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "reglu"}, "reglu"),
        ({"num_attention_heads": 7}, "multiple"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"seq_len_interpolation_factor": -2}, "seq_len_interpolation_factor"),
        ({"normalization": "batchnorm"}, "batchnorm"),
        ({"hidden_size": None}, "missing"),
    ],
)
def test_nemo_settings_that_cannot_be_are_refused(change: dict[str, object], words: str) -> None:
    config = nemo_config(spec_of(QWEN2)) | change
    del config["minitron"]
    config = {key: value for key, value in config.items() if value is not None or key not in change}
    with pytest.raises(SpecError, match=words):
        spec_from_nemo_config(config)


def test_sizes_edited_by_hand_are_refused() -> None:
    config = nemo_config(spec_of(QWEN2)) | {"ffn_hidden_size": 4000}
    with pytest.raises(SpecError, match=r"ffn_hidden_size = 4000, but minitron\.spec says 4864"):
        spec_from_nemo_config(config)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"layers": ()},
        {"layers": (transformer_layer(num_attention_heads=9, num_query_groups=2, ffn_hidden_size=8),)},
        {"layers": (transformer_layer(num_attention_heads=0, num_query_groups=1, ffn_hidden_size=8),)},
    ],
)
def test_impossible_architectures_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        replace(UNEVEN, **change)


def test_unknown_families_and_keys_are_refused() -> None:
    with pytest.raises(SpecError, match="mamba"):
        family_named("mamba")
    with pytest.raises(SpecError, match="surprise"):
        ModelSpec.from_dict(UNEVEN.to_dict() | {"surprise": 1})
    assert set(FAMILIES) >= {"llama", "qwen2"}


def test_digest_is_the_same_in_another_process() -> None:
    code = "from tests.unit.test_arch import UNEVEN; print(UNEVEN.digest())"
    run = [sys.executable, "-c", code]
    found = {
        subprocess.run(run, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {UNEVEN.digest()}
    assert replace(UNEVEN, norm_eps=1e-6).digest() != UNEVEN.digest()
