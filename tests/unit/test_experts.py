"""Mixtures of experts: counts of published models, every family against transformers, bytes there and back."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.arch.expert_fields import feed_forwards
from nemo_minitron.arch.families import family_of_hf_config, nearest_family
from nemo_minitron.arch.layer import Attention, LayerSpec, Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.megatron_dist import write_megatron
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.nemo2 import write_nemo2
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.cache import CacheConfig, cache_problems
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.errors import CheckpointError, LayoutError, SpecError
from nemo_minitron.megatron.placement import check_layout
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.ops.routing import route, router_divergence
from nemo_minitron.pruning.diff import diff_plans
from nemo_minitron.pruning.plan import PruningPlan
from tests.support.expert_models import CONFIGS, loaded, write_experts
from tests.support.loaded import hf_logits, megatron_logits

CASES = pytest.mark.parametrize("case", CONFIGS)


def mixture(experts: Moe, *, heads: int, groups: int, layers: int, **traits: object) -> ModelSpec:
    attention = Attention(num_attention_heads=heads, num_query_groups=groups)
    return ModelSpec(layers=(LayerSpec(mixer=attention, feed_forward=experts),) * layers, head_dim=128, **traits)


# Published: huggingface.co/Qwen/Qwen3-30B-A3B (30.5B, 3.3B active), arXiv:2401.04088 (Mixtral: 47B, 13B active; the
# weights are 46.7B and 12.9B), huggingface.co/Qwen/Qwen1.5-MoE-A2.7B (14.3B, 2.7B active).
PUBLISHED = {
    "Qwen3-30B-A3B": (
        mixture(
            Moe(num_experts=128, expert_ffn_hidden_size=768, top_k=8),
            heads=32,
            groups=4,
            layers=48,
            vocab_size=151_936,
            hidden_size=2048,
            max_position_embeddings=40_960,
            qk_norm=True,
        ),
        (30.5, 3.35),
    ),
    "Mixtral-8x7B": (
        mixture(
            Moe(num_experts=8, expert_ffn_hidden_size=14_336, top_k=2),
            heads=32,
            groups=8,
            layers=32,
            vocab_size=32_000,
            hidden_size=4096,
            max_position_embeddings=32_768,
        ),
        (46.7, 12.9),
    ),
    "Qwen1.5-MoE-A2.7B": (
        mixture(
            Moe(num_experts=60, expert_ffn_hidden_size=1408, top_k=4, shared_ffn_hidden_size=5632, shared_gate=True),
            heads=16,
            groups=16,
            layers=24,
            vocab_size=151_936,
            hidden_size=2048,
            max_position_embeddings=8192,
            qkv_bias=True,
        ),
        (14.3, 2.7),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    spec, (total, active) = PUBLISHED[name]
    assert parameter_count(spec) / 1e9 == pytest.approx(total, abs=0.05)
    assert parameter_count(spec, active=True) / 1e9 == pytest.approx(active, abs=0.05)


def test_a_spec_survives_its_data_and_refuses_what_does_not_fit() -> None:
    spec, _ = PUBLISHED["Qwen1.5-MoE-A2.7B"]
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(SpecError, match="top_k = 61 with num_experts = 60"):
        replace(spec, layers=(spec.layers[0].routed_to(61),))
    with pytest.raises(SpecError, match="neither biases"):
        replace(spec, linear_bias=True)


def test_experts_are_split_over_expert_parallel_ranks_in_equal_numbers() -> None:
    spec, _ = PUBLISHED["Qwen1.5-MoE-A2.7B"]
    check_layout(spec, ParallelConfig(expert=4))
    with pytest.raises(LayoutError, match=r"num_experts = 60 is not a multiple of parallel\.expert = 8"):
        check_layout(spec, ParallelConfig(expert=8))
    mlp = LayerSpec.from_dict({"num_attention_heads": 32, "num_query_groups": 8, "ffn_hidden_size": 8})
    dense = replace(spec, layers=(mlp,))
    with pytest.raises(LayoutError, match="the model has no experts"):
        check_layout(dense, ParallelConfig(expert=2))


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_routing_is_the_sentence_that_defines_it(sigmoid: bool, normalize: bool) -> None:
    """A loop over tokens in float64: choose by score plus bias, weigh by score."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(7, generator=generator, dtype=torch.float64)
    found = route(logits, top_k=3, sigmoid=sigmoid, normalize=normalize, bias_E=bias, scaling=2.5)
    for token in range(50):
        row = logits[token].exp()
        scores = row / (1 + row) if sigmoid else row / row.sum()
        chosen = sorted(range(7), key=lambda expert: -float(scores[expert] + bias[expert]))[:3]
        whole = sum(float(scores[expert]) for expert in chosen) if normalize else 1.0
        expected = [2.5 * float(scores[expert]) / whole if expert in chosen else 0.0 for expert in range(7)]
        assert found.weights[token].tolist() == pytest.approx(expected, rel=1e-12)
        assert found.chosen[token].nonzero().flatten().tolist() == sorted(chosen)


def test_an_expert_is_chosen_though_its_weight_is_rounded_to_zero() -> None:
    """Dispatchers count on `top_k` experts a token."""
    found = route(torch.tensor([[1000.0, 0.0, -1000.0]]), top_k=2)
    assert found.weights.tolist() == [[1, 0, 0]]
    assert found.chosen.tolist() == [[True, True, False]]


@pytest.mark.parametrize("sigmoid", [False, True])
def test_routers_differ_by_the_kl_of_their_scores(sigmoid: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    teacher, student = (torch.randn(20, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    keep = torch.rand(20, generator=generator) < 0.7
    student.requires_grad_()
    found = router_divergence(teacher, student, keep, sigmoid=sigmoid)
    expected = 0.0
    for token in keep.nonzero().flatten().tolist():
        p, q = (1 / (1 + (-x[token]).exp()) if sigmoid else x[token].exp() for x in (teacher, student.detach()))
        expected += float((p / p.sum() * ((p / p.sum()).log() - (q / q.sum()).log())).sum())
    assert float(found) == pytest.approx(expected, rel=1e-10)
    torch.autograd.gradcheck(lambda x: router_divergence(teacher, x, keep, sigmoid=sigmoid), (student,))
    same = router_divergence(teacher, teacher, keep, sigmoid=sigmoid)
    assert float(same) == pytest.approx(0.0, abs=1e-12)


@CASES
def test_logits_are_those_of_transformers(case: str, tmp_path: Path, here: Runtime) -> None:
    write_experts(tmp_path / "hf", case)
    expected = hf_logits(loaded(tmp_path / "hf"))
    torch.testing.assert_close(megatron_logits(open_hf(tmp_path / "hf"), here), expected, rtol=1e-4, atol=1e-4)


def same_bytes(one: Path, other: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key


@CASES
def test_bytes_there_and_back(case: str, tmp_path: Path) -> None:
    """bf16: transformers, Hugging Face, our folder, Hugging Face; and from transformers' form with fused experts."""
    write_experts(tmp_path / "first", case, dtype=torch.bfloat16)
    source = open_hf(tmp_path / "first")
    assert source.dtype == torch.bfloat16
    assert nearest_family(source.spec) == source.family or case == "mixtral, window"
    write_hf(source, tmp_path / "plain")
    same_bytes(tmp_path / "first", tmp_path / "plain")
    write_folder(source, tmp_path / "folder")
    again = open_checkpoint(tmp_path / "folder")
    assert again.spec == source.spec
    assert again.family == source.family
    write_hf(again, tmp_path / "again")
    same_bytes(tmp_path / "first", tmp_path / "again")
    loaded(tmp_path / "first").to(torch.bfloat16).save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in fused)
    write_hf(open_hf(tmp_path / "fused"), tmp_path / "from_fused")
    same_bytes(tmp_path / "first", tmp_path / "from_fused")


@pytest.mark.parametrize("case", ["qwen3_moe, some dense", "qwen2_moe", "dots1"])
@pytest.mark.parametrize("kind", ["nemo2", "megatron"])
def test_other_formats_hold_experts_and_say_what_they_are(case: str, kind: str, tmp_path: Path) -> None:
    """Also without our own file beside Megatron's words for it."""
    write_experts(tmp_path / "first", case, dtype=torch.bfloat16)
    source = open_hf(tmp_path / "first")
    (write_nemo2 if kind == "nemo2" else write_megatron)(source, tmp_path / kind)
    again = open_checkpoint(tmp_path / kind)
    assert again.spec == source.spec
    write_hf(again, tmp_path / "again")
    same_bytes(tmp_path / "first", tmp_path / "again")
    (ours,) = (tmp_path / kind).rglob("minitron.json")
    ours.unlink()
    foreign = open_checkpoint(tmp_path / kind)
    assert replace(foreign.spec, max_position_embeddings=256) == source.spec


def test_fused_experts_of_another_shape_are_named(tmp_path: Path) -> None:
    write_experts(tmp_path / "first", "qwen3_moe")
    loaded(tmp_path / "first").save_pretrained(tmp_path / "fused", save_original_format=False)
    file = tmp_path / "fused" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj"
    save_file(tensors | {name: tensors[name][:, :, :-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"missing, model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight first"):
        open_hf(tmp_path / "fused")


def test_configs_that_say_something_else_are_refused() -> None:
    contradiction = {"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 8}
    too_many = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 9}
    grouped = {"model_type": "dots1", "n_group": 4, "n_routed_experts": 8, "num_experts_per_tok": 2}
    for config, words in (
        (contradiction, "num_experts = 4, but num_local_experts = 8"),
        (too_many, "top_k = 9 with num_experts = 4"),
        (grouped, "n_group = 4 is not supported"),
    ):
        with pytest.raises(SpecError, match=words):
            family_of_hf_config(config).read_config(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe_router_score_function": "sqrtsoftplus"}, "moe_router_score_function = 'sqrtsoftplus' is not supported"),
        ({"moe_expert_capacity_factor": 1.25}, "moe_expert_capacity_factor = '1.25' is not supported"),
        ({"moe_layer_freq": [0, 1]}, "moe_layer_freq names 2 layers, num_layers = 3"),
    ],
)
def test_settings_of_megatron_that_change_experts_are_refused(changes: dict[str, object], said: str) -> None:
    fields = {"num_layers": 3, "num_moe_experts": 4, "ffn_hidden_size": 32, "moe_ffn_hidden_size": 8}
    assert feed_forwards(fields, where="config") is not None
    with pytest.raises(SpecError, match=re.escape(said)):
        feed_forwards({**fields, **changes}, where="config")


def test_a_cache_holds_no_routers() -> None:
    problems = cache_problems(CacheConfig(), DistillConfig(router_weight=0.1, tokens=10_000), 1)
    assert problems == ["distill.router_weight: a cache holds no routers; leave cache out"]


def test_plans_that_route_to_other_numbers_of_experts_differ(tmp_path: Path) -> None:
    write_experts(tmp_path / "hf", "qwen3_moe")
    spec = open_hf(tmp_path / "hf").spec
    plan = PruningPlan.keep_all(spec)
    layers = [replace(layer, top_k=top_k) for layer, top_k in zip(plan.layers, (1, 2, 2), strict=True)]
    found = diff_plans(plan, replace(plan, layers=tuple(layers)))
    assert found.settings == ("experts a token differ in layers 0",)
    assert not found.same
