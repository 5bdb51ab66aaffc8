"""What families read from and write to configuration files, and what they refuse."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from nemo_minitron.arch.families import FAMILIES, Family, family_named, family_of_hf_config, nearest_family
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.nemo_config import nemo_config, spec_from_nemo_config
from nemo_minitron.arch.spec import Activation, ModelSpec, Norm, YarnScaling
from nemo_minitron.arch.weights import parameter_count, weights
from nemo_minitron.checkpoints.hf import hf_names
from nemo_minitron.checkpoints.parts import stored_shapes
from nemo_minitron.errors import SpecError
from nemo_minitron.stages.prune import check_export
from tests import tiny
from tests.jobs import config_for

# Sizes of published models.
MISTRAL_7B = MistralConfig(max_position_embeddings=32768, num_key_value_heads=8, rms_norm_eps=1e-5)
QWEN3_06B = Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
MINITRON_4B = NemotronConfig(
    hidden_size=3072,
    intermediate_size=9216,
    num_hidden_layers=32,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
)
PHI3_MINI = Phi3Config(sliding_window=2047)
GEMMA_2B = GemmaConfig(
    hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1
)
GEMMA3_1B = Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=1152,
    intermediate_size=6912,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    max_position_embeddings=32768,
    sliding_window=512,
)
# With their numbers of parameters, which the model cards state or round.
PUBLISHED = {
    "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096),
    "Qwen3-0.6B": (QWEN3_06B, 596_049_920),
    "Minitron-4B": (MINITRON_4B, 4_190_509_056),
    "Phi-3-mini-4k": (PHI3_MINI, 3_821_079_552),
    "gemma-2b": (GEMMA_2B, 2_506_172_416),
    "gemma-3-1b": (GEMMA3_1B, 999_885_952),
}
EACH = pytest.mark.parametrize("name", PUBLISHED)


def family_of(config: PreTrainedConfig) -> Family:
    return family_of_hf_config(config.to_dict())


def read(config: dict[str, Any]) -> ModelSpec:
    return family_of_hf_config(config).read_config(config)


@EACH
def test_names_shapes_and_counts_are_those_of_transformers(name: str) -> None:
    config, count = PUBLISHED[name]
    spec = read(config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ours = {}
    for weight in weights(spec):
        names = hf_names(family_of(config), weight)
        ours |= dict(zip(names, stored_shapes(weight, spec, tensors=len(names)), strict=True))
    assert ours == {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert parameter_count(spec) == count == model.num_parameters()


@EACH
def test_config_json_round_trip(name: str) -> None:
    """What is written is read back the same, by us and, in what it computes with, by transformers."""
    config, _ = PUBLISHED[name]
    spec = read(config.to_dict())
    written = family_of(config).write_config(spec)
    assert read(written) == spec
    theirs, again = config.to_dict(), type(config)(**written).to_dict()
    ignored = {"architectures", "dtype", "torch_dtype", "transformers_version", "initializer_range", "sliding_window"}
    computed = {key for key in theirs if not key.endswith("token_id")} - ignored
    assert {key: again[key] for key in computed} == {key: theirs[key] for key in computed}
    assert again.get("sliding_window") == theirs.get("sliding_window")


def test_what_published_configs_leave_out_is_what_transformers_assumes() -> None:
    """Keys that a class has defaults for may be absent; the defaults are the class's, not Llama's."""
    for config, absent in (
        (Qwen3Config(head_dim=128), {"head_dim", "tie_word_embeddings"}),
        (NemotronConfig(), {"head_dim", "num_key_value_heads", "rope_parameters", "partial_rotary_factor"}),
        (MistralConfig(), {"sliding_window", "head_dim"}),
        (GemmaConfig(), {"head_dim", "tie_word_embeddings", "hidden_act", "rope_parameters"}),
        (Gemma3TextConfig(), {"layer_types", "sliding_window", "query_pre_attn_scalar", "rope_parameters"}),
    ):
        whole = config.to_dict()
        assert absent <= whole.keys() | {"partial_rotary_factor"}
        assert read({key: value for key, value in whole.items() if key not in absent}) == read(whole)


def test_older_spellings() -> None:
    """`rope_theta` and its relatives at the top, as before transformers 5."""
    gemma = GEMMA3_1B.to_dict() | {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2}
    del gemma["rope_parameters"], gemma["layer_types"]
    spec = read(gemma)
    assert (spec.rotary_base, spec.local_rotary_base) == (5e5, 2e4)
    assert [layer.local for layer in spec.layers[:4]] == [True, False, True, False]
    phi = PHI3_MINI.to_dict() | {"rope_theta": 123.0, "partial_rotary_factor": 0.5}
    del phi["rope_parameters"]
    spec = read(phi)
    assert (spec.rotary_base, spec.rotary_percent, spec.layer.local, spec.sliding_window) == (123.0, 0.5, True, 2047)
    assert read(GEMMA_2B.to_dict() | {"hidden_act": "gelu"}).activation is Activation.GEGLU_TANH


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
LLAMA = tiny.FAMILY_CONFIGS["llama"][0]()
REFUSED = [
    (LLAMA, {"attention_bias": True}, "attention_bias = True"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias = True"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    (LLAMA, {"sliding_window": 1024}, "sliding_window = 1024"),
    (LLAMA, {"partial_rotary_factor": 0.5}, r"rotary_percent = 0\.5"),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "factor is missing"),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0}}, "mscale = 2"),
    (LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
    (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": math.nan}}, "factor = 'nan'"),
    (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": math.inf}}, "factor = 'inf'"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling says"),
    (LLAMA, {"rope_theta": 5e5}, "rope_theta = 10000"),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}}, "type = 'linear'"),
    (LLAMA, {"rope_parameters": None, "rope_theta": None}, "rope_theta = 'None'"),
    (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'"),
    (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps = null"),
    (LLAMA, {"head_dim": 0}, "head_dim = 0"),
    (LLAMA, {"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config"),
    (LLAMA, {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    (LLAMA, {"residual_multiplier": 0.22}, r"residual_multiplier = 0\.22"),
    (LLAMA, {"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30\.0"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts = 8"),
    (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    (LLAMA, {"vocab_size": "many"}, "vocab_size = 'many'"),
    (QWEN3_06B, {"use_sliding_window": True}, "use_sliding_window = True"),
    (QWEN3_06B, {"attention_bias": True}, "attention_bias = True"),
    (QWEN3_06B, {"num_experts": 8}, "num_experts = 8"),
    (MINITRON_4B, {"attention_bias": True}, "attention_bias = True"),
    (MINITRON_4B, {"hidden_act": "silu"}, "hidden_act = 'silu'"),
    (MINITRON_4B, {"rope_parameters": tiny.LLAMA_3_SCALING}, "rope_scaling"),
    (PHI3_MINI, {"rope_parameters": LONGROPE}, "rope_type = 'longrope'"),
    (PHI3_MINI, {"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rope_type = 'su'"),
    (GEMMA_2B, {"hidden_activation": "gelu_new"}, "hidden_activation = 'gelu_new'"),
    (GEMMA_2B, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    (GEMMA_2B, {"model_type": "gemma2"}, "final_logit_softcapping"),
    (GEMMA3_1B, {"model_type": "gemma3"}, "pictures"),
    (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50\.0"),
    (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    (GEMMA3_1B, {"layer_types": ["chunked_attention"] * 26}, "layer_types"),
    (GEMMA3_1B, {"layer_types": ["full_attention"]}, "layer_types"),
    (GEMMA3_1B, {"sliding_window": None}, "sliding_window = None"),
    (
        GEMMA3_1B,
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}},
        "without scaling",
    ),
]


@pytest.mark.parametrize(("config", "change", "words"), REFUSED, ids=[f"{words}" for _, _, words in REFUSED])
def test_settings_that_change_the_result_are_refused_by_name(
    config: PreTrainedConfig, change: dict[str, Any], words: str
) -> None:
    data = config.to_dict()
    read(data)
    with pytest.raises(SpecError, match=words):
        read(data | change)


CLASSES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "nemotron": NemotronConfig,
    "phi3": Phi3Config,
    "gemma": GemmaConfig,
    "gemma3": Gemma3TextConfig,
    "olmoe": OlmoeConfig,
}


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_the_classes(name: str) -> None:
    """Every default of ours, against the fields of the class; every deciding field of the class, against ours."""
    ours = FAMILIES[name].defaults
    theirs = {field.name: field.default for field in fields(CLASSES[name])}
    assert {key: theirs.get(key) for key in ours} == dict(ours)
    deciding = {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
    }
    deciding |= {"num_key_value_heads", "hidden_act", "hidden_activation", "rms_norm_eps", "norm_eps"}
    deciding |= {"max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert deciding & theirs.keys() <= ours.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_a_config_of_a_model_type_alone_is_the_default_model(name: str) -> None:
    config = CLASSES[name]()
    alone = {"model_type": config.model_type}
    assert read(alone) == read(config.to_dict())
    assert set(FAMILIES[name].assumed(alone)) <= set(FAMILIES[name].defaults)


def test_a_name_of_another_format_is_refused_where_the_key_is_missing() -> None:
    whole = LLAMA.to_dict()
    without = {key: value for key, value in whole.items() if key != "rms_norm_eps"}
    assert read(without) == read(whole | {"rms_norm_eps": 1e-6})
    with pytest.raises(SpecError, match=r"rms_norm_eps is missing, and layer_norm_epsilon"):
        read(without | {"layer_norm_epsilon": 1e-3})
    assert read(whole | {"layer_norm_epsilon": 1e-3, "n_ctx": 7}) == read(whole)
    with pytest.raises(SpecError, match="max_position_embeddings is missing, and n_ctx"):
        read({key: value for key, value in whole.items() if key != "max_position_embeddings"} | {"n_ctx": 7})


def test_two_spellings_that_agree_are_one() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    both = LLAMA.to_dict() | {"rope_parameters": {**scaling, "rope_theta": 1e4}, "rope_theta": 1e4}
    spec = read(both | {"rope_scaling": {**scaling, "type": "yarn"}})
    assert spec == read(both)
    assert spec.rope_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=512)
    short = LLAMA.to_dict() | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    assert read(short).rope_scaling.original_max_position_embeddings == LLAMA.max_position_embeddings


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"activation": Activation.GELU}, "LlamaForCausalLM does not compute activation = gelu"),
        ("llama", {"qkv_bias": True, "qk_norm": True}, "qkv_bias = True, qk_norm = True"),
        ("llama", {"norm": Norm.LAYERNORM}, "norm = layernorm"),
        ("qwen2", {}, "qkv_bias = False"),
        ("qwen3", {"qk_norm": True, "rotary_percent": 0.5}, "rotary_percent"),
        ("gemma3", {"hidden_size": 30}, "query_scalar|activation"),
    ],
)
def test_no_config_json_says_what_its_class_does_not_compute(family: str, change: dict[str, Any], words: str) -> None:
    spec = ModelSpec(
        vocab_size=64,
        hidden_size=32,
        head_dim=8,
        layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48),) * 2,
        max_position_embeddings=128,
    )
    with pytest.raises(SpecError, match=words):
        family_named(family).write_config(replace(spec, **change))


def test_a_gemma3_that_transformers_refuses_is_refused_before() -> None:
    spec = read(GEMMA3_1B.to_dict())
    with pytest.raises(SpecError, match="hidden_size = 1150 and 4 heads"):
        family_named("gemma3").write_config(replace(spec, hidden_size=1150))
    with pytest.raises(StrictDataclassClassValidationError):
        Gemma3TextConfig(hidden_size=1150, num_attention_heads=4)


def test_export_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    spec = replace(read(GEMMA3_1B.to_dict()), hidden_size=1150)
    config = config_for(tmp_path, tmp_path)
    with pytest.raises(SpecError, match="hidden_size = 1150 and 4 heads"):
        check_export(config, spec, "gemma3")
    check_export(config_for(tmp_path, tmp_path, export={"formats": ["nemo"]}), spec, "gemma3")


# -- NeMo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", tiny.FAMILY_CONFIGS)
def test_nemo_keys_alone_say_what_they_can(case: str) -> None:
    """Without our section the same computation is read back; where NeMo-1 cannot say it, no reader may guess."""
    kind, extra = tiny.FAMILY_CONFIGS[case]
    data = kind(num_hidden_layers=4, **extra).to_dict()
    spec, family = read(data), family_of_hf_config(data).name
    config = yaml.safe_load(yaml.safe_dump(nemo_config(spec)))
    assert spec_from_nemo_config(config) == spec
    del config["minitron"]
    if case in ("llama 3.2", "gemma3"):
        assert config["name"] == "nemo_minitron"
        with pytest.raises(SpecError, match="name = 'nemo_minitron' is not supported"):
            spec_from_nemo_config(config)
        return
    found = spec_from_nemo_config(config)
    assert found == spec
    # Mistral without a window, and Phi-3 without one and with complete heads turned, compute what Llama does.
    twin = {"mistral": "llama", "phi3": "llama"}
    assert nearest_family(found) == twin.get(case, family)


def test_nemo_keys_of_minitron() -> None:
    """Values of NeMo's own configuration of Nemotron-4 models."""
    config = nemo_config(read(MINITRON_4B.to_dict()))
    expected = {
        "activation": "squared-relu",
        "normalization": "layernorm1p",
        "layernorm_zero_centered_gamma": True,
        "rotary_percentage": 0.5,
        "share_embeddings_and_output_weights": False,
        "kv_channels": 128,
        "num_query_groups": 8,
        "bias": False,
        "name": "te_gpt",
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer_block_type": "post_ln"}, "transformer_block_type"),
        ({"num_moe_experts": 8}, "num_moe_experts"),
        ({"headscale": True}, "headscale"),
        ({"window_size": [16, 16]}, "window_size"),
        ({"openai_gelu": True}, "openai_gelu"),
        ({"rotary_interleaved": True}, "rotary_interleaved"),
    ],
)
def test_nemo_settings_that_nothing_computes_are_refused(change: dict[str, Any], words: str) -> None:
    config = nemo_config(read(QWEN3_06B.to_dict())) | change
    del config["minitron"]
    with pytest.raises(SpecError, match=words):
        spec_from_nemo_config(config)


def test_digests_of_models_without_new_traits_stay() -> None:
    """A run folder of an earlier version is still the same run."""
    spec = ModelSpec(
        vocab_size=64,
        hidden_size=32,
        head_dim=8,
        layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48),) * 2,
        max_position_embeddings=128,
    )
    assert set(spec.to_dict()) == {
        *("vocab_size", "hidden_size", "head_dim", "layers", "max_position_embeddings", "activation", "norm"),
        *("norm_eps", "rotary_base", "rotary_percent", "rope_scaling", "tied_embeddings", "qkv_bias", "qk_norm"),
        "linear_bias",
    }
    assert spec.to_dict()["layers"] == {
        "count": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
    }


def test_auto_config_takes_what_is_written() -> None:
    for config, _ in PUBLISHED.values():
        written = family_of_hf_config(config.to_dict()).write_config(read(config.to_dict()))
        assert type(AutoConfig.for_model(**written)) is type(config)
