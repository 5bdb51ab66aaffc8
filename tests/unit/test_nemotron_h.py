"""Hybrids of Mamba, attention, MLPs, experts: published sizes, transformers' logits, bytes, cuts, what is refused."""

import json
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, NemotronHConfig

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.families import NEMOTRON_H, family_of_hf_config, nearest_family, nemotron_h_experts
from nemo_minitron.arch.layer import Attention, Mamba, Mlp, Moe, RouterScore
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count, weights
from nemo_minitron.checkpoints.hf import open_hf, read_architecture, write_hf
from nemo_minitron.checkpoints.megatron_dist import write_megatron
from nemo_minitron.checkpoints.nemo1 import write_folder, write_nemo
from nemo_minitron.checkpoints.nemo2 import write_nemo2
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.cli import recipes
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.sizes import LayerSizes, TargetConfig
from nemo_minitron.errors import LayoutError, MinitronError, PlanError, SpecError
from nemo_minitron.evaluation.generate import generate
from nemo_minitron.megatron import sharded_io
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.placement import check_layout
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan
from nemo_minitron.pruning.rounds import round_specs
from nemo_minitron.stages.preflight import check_models
from tests import tiny
from tests.support.expert_models import loaded
from tests.support.hybrid_sizes import ACTIVE, PUBLISHED, active_by_hand, by_hand, published
from tests.support.loaded import hf_logits, megatron_logits, megatron_model

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))

# -- published sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config = published(name)
    spec = family_of_hf_config(config).read_config(config)
    assert parameter_count(spec) == by_hand(config)
    assert parameter_count(spec) == pytest.approx(PUBLISHED[name]["total"], rel=6e-4)
    kinds = [type(layer.parts[0]) for layer in spec.layers]
    assert [kinds.count(kind) for kind in (Mamba, Mlp, Attention, Moe)] == [
        config["hybrid_override_pattern"].count(letter) for letter in "M-*E"
    ]
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert NEMOTRON_H.read_config(NEMOTRON_H.write_config(spec)) == spec


def test_defaults_are_those_of_the_class() -> None:
    theirs = {field.name: field.default for field in fields(NemotronHConfig)}
    for defaults in (NEMOTRON_H.defaults, nemotron_h_experts.DEFAULTS):
        assert {key: theirs.get(key) for key in defaults} == dict(defaults)
    alone = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-"}
    whole = NemotronHConfig(hybrid_override_pattern="M*-").to_dict()
    assert NEMOTRON_H.read_config(alone) == NEMOTRON_H.read_config(whole)
    with pytest.raises(SpecError, match="layer_norm_epsilon is missing, and rms_norm_eps"):
        NEMOTRON_H.read_config(alone | {"rms_norm_eps": 1e-6})


@pytest.mark.parametrize("name", ACTIVE)
def test_published_sizes_of_what_a_token_passes_through(name: str) -> None:
    config = published(name)
    spec = NEMOTRON_H.read_config(config)
    active = parameter_count(spec, active=True)
    assert active == active_by_hand(config)
    assert active == pytest.approx(ACTIVE[name], rel=2e-3)
    if name.endswith("30B"):  # its page: 3.2B, and 3.6B with the embedding
        assert round((active - spec.vocab_size * spec.hidden_size) / 1e9, 1) == 3.2
        assert round(active / 1e9, 1) == 3.6
    assert spec.layers[1].moe == Moe(
        num_experts=config["n_routed_experts"],
        expert_ffn_hidden_size=1856,
        top_k=6,
        shared_ffn_hidden_size=config["moe_shared_expert_intermediate_size"],
        score_function=RouterScore.SIGMOID,
        correction_bias=True,
        scaling_factor=2.5,
        router_fp32=True,
    )
    assert spec.kinds == {"mamba": 23, "attention": 6, "moe": 23}
    assert nearest_family(spec) == "nemotron_h"


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nemotron_h") / "hf"
    tiny.write_nemotron_h(path)
    return path


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nemotron_3") / "hf"
    tiny.write_nemotron_h(path, pattern=tiny.NEMOTRON_3_PATTERN)
    return path


@pytest.fixture(params=["folder", "experts_folder"])
def either(request: pytest.FixtureRequest) -> Path:
    """Without experts, and with them."""
    found: Path = request.getfixturevalue(request.param)
    return found


EXPERT_CUTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "hidden": {"hidden_size": 48},
    "experts": {"num_experts": 4},
    "expert FFN": {"expert_ffn_hidden_size": 16},
    "shared FFN": {"shared_ffn_hidden_size": 24},
    "top_k": {"top_k": 1},
    "mamba heads": {"mamba_num_heads": 4},
    "mamba channels": {"mamba_head_dim": 5},
    "heads": {"num_query_groups": 2, "num_attention_heads": 2},
    "layers": {"drop_layers": (1, 3, 6)},
    "layers of experts": {"num_moe_layers": 1},
    "all layers of experts": {"drop_layers": (1, 5, 8)},
    "all": {
        "num_moe_layers": 2,
        "num_mamba_layers": 2,
        "num_experts": 3,
        "expert_ffn_hidden_size": 8,
        "shared_ffn_hidden_size": 32,
        "hidden_size": 40,
        "ffn_hidden_size": 64,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "num_attention_heads": 4,
    },
}


@pytest.mark.parametrize("cut", EXPERT_CUTS)
def test_logits_with_experts_are_those_of_transformers_before_and_after_each_cut(
    cut: str, experts_folder: Path, tmp_path: Path, here: Runtime
) -> None:
    source = open_hf(experts_folder)
    pruned = PrunedSource(source, random_plan(TargetConfig(random_seed=3, **EXPERT_CUTS[cut]), source.spec, seed=3))
    write_hf(pruned, tmp_path / "pruned")
    again = open_hf(tmp_path / "pruned")
    assert again.spec == pruned.spec
    expected = hf_logits(loaded(tmp_path / "pruned"))
    before = hf_logits(loaded(experts_folder))
    if cut == "nothing":
        torch.testing.assert_close(expected, before, rtol=0, atol=0)
    else:
        assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(megatron_logits(again, here), expected, rtol=1e-4, atol=1e-4)


CUTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mamba heads": {"mamba_num_heads": 4},
    "mamba channels": {"mamba_head_dim": 5},
    "mamba groups": {"mamba_num_groups": 2},
    "hidden": {"hidden_size": 48},
    "ffn": {"ffn_hidden_size": 50},
    "heads": {"num_query_groups": 2, "num_attention_heads": 2},
    "layers": {"drop_layers": (1, 3, 6)},
    "all": {
        "mamba_num_groups": 3,
        "mamba_num_heads": 3,
        "mamba_head_dim": 6,
        "hidden_size": 40,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_layers": 7,
    },
}


@pytest.mark.parametrize("cut", CUTS)
def test_logits_are_those_of_transformers_before_and_after_each_cut(
    cut: str, folder: Path, tmp_path: Path, here: Runtime
) -> None:
    source = open_hf(folder)
    pruned = PrunedSource(source, random_plan(TargetConfig(random_seed=3, **CUTS[cut]), source.spec, seed=3))
    write_hf(pruned, tmp_path / "pruned")
    again = open_hf(tmp_path / "pruned")
    assert again.spec == pruned.spec
    expected = hf_logits(loaded(tmp_path / "pruned"))
    if cut == "nothing":
        torch.testing.assert_close(expected, hf_logits(loaded(folder)), rtol=0, atol=0)
    torch.testing.assert_close(megatron_logits(again, here), expected, rtol=1e-4, atol=1e-4)


def test_bytes_there_and_back(either: Path, tmp_path: Path, here: Runtime) -> None:
    """bf16: Hugging Face, our folder, a `.nemo`, Hugging Face; and through a Megatron model that saves itself.

    And from the names and tensors that the class has inside, experts of a layer in one tensor.
    """
    model = AutoModelForCausalLM.from_pretrained(either, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "inside", save_original_format=False)
    write_hf(open_hf(tmp_path / "inside"), tmp_path / "from_inside")
    inside = load_file(tmp_path / "inside" / "model.safetensors")
    assert {name.partition(".")[0] for name in inside} == {"model", "lm_head"}
    assert any(name.endswith("experts.up_proj") for name in inside) == (either.parent.name.startswith("nemotron_3"))
    source = open_hf(tmp_path / "first")
    write_folder(source, tmp_path / "folder")
    write_nemo(open_checkpoint(tmp_path / "folder"), tmp_path / "model.nemo")
    write_hf(open_checkpoint(tmp_path / "model.nemo"), tmp_path / "again")
    chunks = build_chunks(source.spec, here, Precision.BF16, trainable=False)
    sharded_io.load_weights(chunks, tmp_path / "folder")
    write_folder(source, tmp_path / "saved")
    sharded_io.save_weights(chunks, tmp_path / "saved")
    write_hf(open_checkpoint(tmp_path / "saved"), tmp_path / "resaved")
    before = load_file(tmp_path / "first" / "model.safetensors")
    for name in ("again", "resaved", "from_inside"):
        after = load_file(tmp_path / name / "model.safetensors")
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype, key
            assert torch.equal(tensor.view(torch.int16), after[key].view(torch.int16)), key


def test_other_formats_hold_experts_in_hybrids(experts_folder: Path, tmp_path: Path) -> None:
    source = open_hf(experts_folder)
    write_nemo2(source, tmp_path / "nemo2")
    write_megatron(open_checkpoint(tmp_path / "nemo2"), tmp_path / "megatron")
    again = open_checkpoint(tmp_path / "megatron")
    assert (again.spec, again.family) == (source.spec, "nemotron_h")
    for name in source.names():
        assert torch.equal(again.get(name), source.get(name)), name


def test_weights_are_called_as_in_megatron(folder: Path, tmp_path: Path, here: Runtime) -> None:
    """As `megatron.core.ssm.mamba_mixer` stores them: parts of fused weights apart."""
    spec = open_hf(folder).spec
    mixer = {name.partition("mixer.")[2] for name in sharded_io.stored_shapes(spec) if "layers.0.mixer." in name}
    parts = [f"in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")]
    parts += [f"conv1d.{kind}.{part}" for kind in ("weight", "bias") for part in "xBC"]
    others = ("in_proj.layer_norm_weight", "A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")
    assert mixer == {*parts, *others}


def test_generation_with_a_cache_of_states_is_that_without(either: Path, here: Runtime) -> None:
    """Prompts of several lengths, shorter than the convolution among them, and of one that ends early."""
    model = megatron_model(open_hf(either), here)
    prompts = [[5], [7, 8], list(range(1, 12)), list(range(40, 75))]

    def finished(sample: int, new: list[int]) -> bool:
        return sample == 2 and len(new) == 3

    found, expected = (
        generate([model], here, prompts, 12, finished=finished, use_cache=cached) for cached in (True, False)
    )
    assert found == expected
    assert [len(new) for new in found] == [12, 12, 3, 12]
    assert len({tuple(new) for new in found}) == 4


# -- dead units -------------------------------------------------------------------------------------------------------


def test_cutting_a_mamba_head_that_gives_nothing_changes_no_logit(tmp_path: Path, here: Runtime) -> None:
    """Its input is zero, so nothing comes out of it; the norm of its group is scaled for fewer channels.

    All norms share their epsilon, so this is exact as far as it is small beside what the norm divides by. A quarter of
    each group stays, so that the scale is a power of two and rounds nothing.
    """
    tiny.write_nemotron_h(tmp_path / "alive", layer_norm_epsilon=1e-14, n_groups=2)
    model = loaded(tmp_path / "alive")
    before = hf_logits(model)
    dead = {0: (1, 2, 3, 4, 6, 7), 3: (0, 1, 3, 5, 6, 7), 5: (0, 1, 2, 4, 5, 6)}
    state = model.state_dict()
    for layer, heads in dead.items():
        rows = torch.tensor([head * 8 + channel for head in heads for channel in range(8)])
        state[f"model.layers.{layer}.mixer.in_proj.weight"][64 + rows] = 0.0
        state[f"model.layers.{layer}.mixer.conv1d.bias"][rows] = 0.0
    expected = hf_logits(model)
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "dead")
    source = open_hf(tmp_path / "dead")
    plan = PruningPlan.keep_all(source.spec)
    layers = list(plan.layers)
    for layer, heads in dead.items():
        kept = {**layers[layer].kept, Axis.MAMBA_HEAD: tuple(head for head in range(8) if head not in heads)}
        layers[layer] = LayerPlan(source=layer, kept=kept)
    pruned = PrunedSource(source, replace(plan, layers=tuple(layers)))
    assert {layer.mamba.mamba_num_heads for layer in pruned.spec.layers if isinstance(layer.mixer, Mamba)} == {2}
    whole, cut = (megatron_logits(each, here, torch.float64) for each in (source, pruned))
    assert (whole - cut).abs().max() < 1e-6 * whole.square().mean().sqrt()
    write_hf(pruned, tmp_path / "pruned")
    torch.testing.assert_close(hf_logits(loaded(tmp_path / "pruned")), expected, rtol=1e-5, atol=1e-5)


DEAD_EXPERT, DEAD_NEURONS = 2, (0, 3, 23)


def test_cutting_an_expert_that_is_never_chosen_and_neurons_that_say_nothing_changes_no_logit(
    experts_folder: Path, tmp_path: Path, here: Runtime
) -> None:
    model = loaded(experts_folder)
    before = hf_logits(model)
    chosen: list[torch.Tensor] = []
    layers = [at for at, letter in enumerate(tiny.NEMOTRON_3_PATTERN) if letter == "E"]
    with torch.no_grad():
        for at in layers:
            mixer = model.model.layers[at].mixer
            mixer.gate.e_score_correction_bias[DEAD_EXPERT] = -100.0
            mixer.experts.down_proj[:, :, list(DEAD_NEURONS)] = 0.0
            mixer.shared_experts.down_proj.weight[:, list(DEAD_NEURONS)] = 0.0
            mixer.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    expected = hf_logits(model)
    assert len(chosen) == len(layers)
    assert all((found != DEAD_EXPERT).all() for found in chosen)
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "dead")
    source = open_hf(tmp_path / "dead")
    plan = PruningPlan.keep_all(source.spec)
    cut = list(plan.layers)
    for at in layers:
        kept = dict(cut[at].kept)
        kept[Axis.EXPERT] = tuple(expert for expert in kept[Axis.EXPERT] if expert != DEAD_EXPERT)
        neurons = [neuron for neuron in range(24) if neuron not in DEAD_NEURONS]
        kept[Axis.EXPERT_FFN] = tuple(expert * 24 + neuron for expert in kept[Axis.EXPERT] for neuron in neurons)
        kept[Axis.SHARED_FFN] = tuple(neuron for neuron in range(40) if neuron not in DEAD_NEURONS)
        cut[at] = LayerPlan(source=at, kept=kept)
    pruned = PrunedSource(source, replace(plan, layers=tuple(cut)))
    experts = pruned.spec.layers[1].moe
    assert (experts.num_experts, experts.expert_ffn_hidden_size, experts.shared_ffn_hidden_size) == (5, 21, 37)
    whole, few = (megatron_logits(each, here, torch.float64) for each in (source, pruned))
    torch.testing.assert_close(few, whole, rtol=1e-6, atol=1e-6)
    write_hf(pruned, tmp_path / "pruned")
    torch.testing.assert_close(hf_logits(loaded(tmp_path / "pruned")), expected, rtol=1e-5, atol=1e-5)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_group_without_heads_is_refused_by_name(folder: Path) -> None:
    spec = open_hf(folder).spec
    plan = PruningPlan.keep_all(spec)
    kept = {**plan.layers[0].kept, Axis.MAMBA_HEAD: (0, 1, 2, 3)}
    with pytest.raises(PlanError, match="layer 0: Mamba group 2 stays without any of its Mamba heads"):
        replace(plan, layers=(LayerPlan(source=0, kept=kept), *plan.layers[1:]))
    with pytest.raises(PlanError, match="mamba_num_heads = 2 is not a multiple of mamba_num_groups = 4"):
        random_plan(TargetConfig(mamba_num_heads=2), spec, seed=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hybrid_override_pattern": "M-E*"}, "n_routed_experts is missing, and there are layers of experts"),
        ({"hybrid_override_pattern": "M-X*"}, "hybrid_override_pattern = 'M-X*'"),
        ({"layers_block_type": ["moe", "conv"]}, "a layer of kind 'conv' is not supported"),
        ({"layers_block_type": ["mlp"]}, "hybrid_override_pattern and layers_block_type differ"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act = 'gelu'"),
        ({"tie_word_embeddings": True}, "does not compute tied_embeddings = True"),
        ({"use_bias": True}, "use_bias = True is not supported"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = '1'"),
        ({"n_groups": 3}, "mamba_num_heads = 128 is not a multiple of mamba_num_groups = 3"),
    ],
)
def test_configurations_that_compute_something_else_are_refused(changes: dict[str, Any], said: str) -> None:
    config = published("Nemotron-H 8B") | changes
    with pytest.raises(SpecError) as error:
        NEMOTRON_H.read_config(config)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe_latent_size": 1024}, "moe_latent_size = 1024 is not supported"),
        ({"n_group": 8}, "n_group = 8 is not supported"),
        ({"topk_group": 4}, "topk_group = 4 is not supported"),
        ({"n_shared_experts": 2}, "n_shared_experts = 2 is not supported"),
        ({"moe_shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size = 0"),
        ({"num_experts_per_tok": 129}, "top_k = 129 with num_experts = 128"),
        ({"n_routed_experts": 1, "num_experts_per_tok": 1}, "num_experts = 1"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob = 'false' is of the wrong kind"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu'"),
        ({"num_local_experts": 64}, "num_local_experts = 64 is not supported"),
    ],
)
def test_experts_that_compute_something_else_are_refused(changes: dict[str, Any], said: str) -> None:
    config = published("Nemotron 3 Nano 30B") | changes
    with pytest.raises(SpecError) as error:
        NEMOTRON_H.read_config(config)
    assert said in str(error.value)


def test_experts_that_the_class_cannot_be_told_are_refused(experts_folder: Path) -> None:
    spec = open_hf(experts_folder).spec
    first, second, *others = spec.layers

    def with_experts(**changes: Any) -> ModelSpec:
        return replace(spec, layers=(first, replace(second, feed_forward=replace(second.moe, **changes)), *others))

    for changes, said in (
        ({"num_experts": 4}, "the model's layers differ in num_experts"),
        ({"top_k": 1}, "the model's layers differ in their experts"),
        ({"score_function": RouterScore.SOFTMAX}, "does not compute score_function = softmax"),
        ({"shared_gate": True}, "does not compute shared_gate = True"),
    ):
        with pytest.raises(SpecError) as error:
            NEMOTRON_H.write_config(with_experts(**changes))
        assert said in str(error.value)
    without = replace(spec, layers=(first, replace(second, feed_forward=replace(second.moe, shared_ffn_hidden_size=0))))
    with pytest.raises(SpecError, match="experts without a shared one"):
        NEMOTRON_H.write_config(without)
    both = replace(second, mixer=spec.layers[2].attention)
    with pytest.raises(SpecError, match=r"layers of attention and experts \(layer 1 first\)"):
        NEMOTRON_H.write_config(replace(spec, layers=(first, both)))


def test_layers_of_experts_of_sizes_of_their_own(experts_folder: Path, tmp_path: Path, here: Runtime) -> None:
    """Which the class cannot be told, and a `.nemo` holds."""
    source = open_hf(experts_folder)
    sizes = LayerSizes(num_experts=4, expert_ffn_hidden_size=10, shared_ffn_hidden_size=20)
    plan = random_plan(TargetConfig(by_layer={5: sizes}), source.spec, seed=0)
    pruned = PrunedSource(source, plan)
    assert [layer.moe.num_experts for layer in pruned.spec.layers if layer.has_experts] == [6, 4, 6]
    with pytest.raises(SpecError, match="the model's layers differ in expert_ffn_hidden_size, num_experts, shared"):
        write_hf(pruned, tmp_path / "hf")
    write_nemo(pruned, tmp_path / "model.nemo")
    again = open_checkpoint(tmp_path / "model.nemo")
    assert again.spec == pruned.spec
    torch.testing.assert_close(megatron_logits(again, here), megatron_logits(pruned, here), rtol=0, atol=0)
    for words in ("experts", "expert FFN size", "shared expert FFN size", "experts a token", "active parameters"):
        assert words in plan.table()


def test_layouts_that_cannot_be_are_refused_before_a_model_is_built(folder: Path) -> None:
    spec = open_hf(folder).spec
    check_layout(spec, ParallelConfig(tensor=2, pipeline=2))
    with pytest.raises(LayoutError, match=r"mamba_num_groups = 4 of layer 0 is not a multiple of parallel\.tensor = 8"):
        check_layout(spec, ParallelConfig(tensor=8))
    check_layout(spec, ParallelConfig(tensor=2, sequence_parallel=True))
    check_layout(NEMOTRON_H.read_config(published("Nemotron 3 Nano 22B")), ParallelConfig(tensor=2, expert=8))
    with pytest.raises(LayoutError, match=r"num_experts = 104 of layer 1 is not a multiple of parallel\.expert = 16"):
        check_layout(NEMOTRON_H.read_config(published("Nemotron 3 Nano 22B")), ParallelConfig(expert=16))

    check_layout(spec, ParallelConfig(tensor=2, context=4))  # 4 heads in 2 groups: 2 ranks a group, with a head each
    with pytest.raises(LayoutError) as error:
        check_layout(spec, ParallelConfig(tensor=2, context=8))
    said = "mamba_num_heads = 8 of layer 0 is not a multiple of 16: under parallel.context = 8 4 ranks share"
    assert said in str(error.value)
    assert str(error.value).count("mamba_num_heads") == 1, "of layers that are alike, the first"


def test_a_student_whose_mamba_heads_do_not_fit_is_refused_before_work() -> None:
    """At TP 8 each rank has a group: in Nemotron-H 8B of 16 heads, in its student of 14, which four cannot share."""
    path = recipes.find("nemotron_h_8b_to_4b_width_256gpu_h100")
    for context, refused in ((2, ""), (4, "mamba_num_heads = 112 of layer 0 is not a multiple of 32")):
        config = load_recipe(path, [f"parallel.context={context}"])
        teacher = read_architecture(path.parent / config.model.architecture)
        with pytest.raises(LayoutError, match=refused) if refused else nullcontext():
            check_models([teacher, *round_specs(config.target, teacher, config.rounds)], config, "nemotron_h")


def test_other_families_cannot_write_a_hybrid(folder: Path) -> None:
    spec = open_hf(folder).spec
    from nemo_minitron.arch.families import FAMILIES

    for name, family in FAMILIES.items():
        if name == "nemotron_h":
            continue
        with pytest.raises(MinitronError, match=r"layers of Mamba alone \(layer 0 first\)"):
            family.write_config(spec)


def test_every_row_has_a_name_in_the_family(folder: Path, experts_folder: Path) -> None:
    specs = [open_hf(path).spec for path in (folder, experts_folder)]
    assert {weight.row.name for spec in specs for weight in weights(spec)} == set(NEMOTRON_H.hf_names)
