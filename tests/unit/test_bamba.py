"""Bamba, with a mixer and an MLP in every layer: its published size, transformers' logits and texts, bytes, cuts."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BambaConfig, PreTrainedModel

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.families import BAMBA, family_of_hf_config, nearest_family
from nemo_minitron.arch.layer import Attention, LayerSpec, Mamba, Mlp
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count, weights
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.megatron_dist import write_megatron
from nemo_minitron.checkpoints.nemo1 import pack_nemo, write_folder
from nemo_minitron.checkpoints.nemo2 import write_nemo2
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import LayoutError, SpecError
from nemo_minitron.evaluation.generate import generate
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.placement import check_layout
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan
from tests import tiny
from tests.support.loaded import megatron_model

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))

# -- configurations ---------------------------------------------------------------------------------------------------

BAMBA_9B: dict[str, Any] = {
    "model_type": "bamba",
    "vocab_size": 128_256,
    "attn_layer_indices": [9, 18, 27],
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "attn_rotary_emb": 64,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
"""ibm-fms/Bamba-9B where it differs from the defaults of the class. Its model card says 9.78B parameters, 32 layers of
which 3 have attention, embeddings that are not tied; states of 128 make that number, the class's 256 would be 9.81B."""


def test_published_size() -> None:
    spec = family_of_hf_config(BAMBA_9B).read_config(BAMBA_9B)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(BambaConfig(**BAMBA_9B))
    assert parameter_count(spec) == theirs.num_parameters() == pytest.approx(9.78e9, rel=1e-3)
    assert [index for index, layer in enumerate(spec.layers) if isinstance(layer.mixer, Attention)] == [9, 18, 27]
    assert {(layer.mamba.mamba_num_heads, layer.mamba.mamba_head_dim) for layer in spec.layers[:9]} == {(128, 64)}
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert BAMBA.read_config(BAMBA.write_config(spec)) == spec
    assert nearest_family(spec) == "bamba"


def test_defaults_are_those_of_the_class() -> None:
    theirs = {field.name: field.default for field in fields(BambaConfig)}
    assert {key: theirs.get(key) for key in BAMBA.defaults} == dict(BAMBA.defaults)
    alone = {"model_type": "bamba"}
    assert BAMBA.read_config(alone) == BAMBA.read_config(BambaConfig().to_dict())
    assert BAMBA.read_config(alone) == BAMBA.read_config(json.loads(BambaConfig().to_json_string()))
    assert BAMBA.read_config(alone).layers[0].mamba.mamba_head_dim == BambaConfig().mamba_d_head == 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attn_layer_indices": [1, 32]}, r"attn_layer_indices = \[1, 32\]"),
        ({"attn_layer_indices": "9"}, "attn_layer_indices = 9"),
        ({"layers_block_type": ["linear_attention"] * 32}, "layers_block_type is not supported"),
        ({"mamba_expand": 3}, r"mamba_n_heads = 128 and mamba_d_head = '64', but .* = 12288"),
        ({"mamba_n_groups": 3}, "mamba_num_heads = 128 is not a multiple of mamba_num_groups = 3"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias = True"),
        ({"time_step_limit": [0.001, 0.1]}, r"time_step_limit = \[0\.001, 0\.1\]"),
        ({"time_step_limit": None}, "time_step_limit = None"),
        ({"partial_rotary_factor": 1.0}, r"does not compute rotary_percent = 1\.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "does not compute rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
    ],
)
def test_configurations_that_compute_something_else_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        BAMBA.read_config(BAMBA_9B | changes)


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bamba") / "hf"
    tiny.write_bamba(path)
    return path


@pytest.fixture
def here() -> Iterator[Runtime]:
    yield runtime.start(ParallelConfig(), seed=0)
    runtime.stop()


@torch.no_grad()
def megatron_logits(source: TensorSource, here: Runtime, dtype: torch.dtype = torch.float32) -> Tensor:
    micro = MicroBatch.of(TOKENS, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    return megatron_model(source, here).to(dtype)(micro.tokens, micro.position_ids, None)


@torch.no_grad()
def hf_logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


CUTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mamba heads": {"mamba_num_heads": 4},
    "mamba channels": {"mamba_head_dim": 8},
    "mamba groups": {"mamba_num_groups": 2},
    "hidden": {"hidden_size": 32},
    "ffn": {"ffn_hidden_size": 50},
    "heads": {"num_attention_heads": 4},
    "KV groups": {"num_query_groups": 3, "num_attention_heads": 6},
    "layers": {"drop_layers": (0, 3)},
    "all attention": {"drop_layers": (1, 3)},
    "all Mamba": {"drop_layers": (0, 2, 4)},
    "all": {
        "mamba_num_groups": 3,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "hidden_size": 48,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_layers": 4,
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


def test_texts_with_caches_of_keys_values_and_states_are_those_of_transformers(folder: Path, here: Runtime) -> None:
    """Prompts of several lengths, shorter than the convolution among them."""
    model, theirs = megatron_model(open_hf(folder), here), loaded(folder)
    prompts = [[5], [7, 8], list(range(1, 12)), list(range(40, 75))]
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "use_cache": True}
    expected = [theirs.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist() for prompt in prompts]
    assert generate([model], here, prompts, 12) == expected
    assert generate([model], here, prompts, 12, use_cache=False) == expected
    assert len({tuple(new) for new in expected}) == 4


def test_bytes_through_every_format_and_back(folder: Path, tmp_path: Path) -> None:
    """bf16: Hugging Face, canonical, `.nemo`, NeMo 2, Megatron, Hugging Face."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "first")
    write_folder(open_hf(tmp_path / "first"), tmp_path / "canonical")
    pack_nemo(tmp_path / "canonical", tmp_path / "x.nemo")
    write_nemo2(open_checkpoint(tmp_path / "x.nemo"), tmp_path / "nemo2")
    write_megatron(open_checkpoint(tmp_path / "nemo2"), tmp_path / "megatron")
    write_hf(open_checkpoint(tmp_path / "megatron"), tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.view(torch.int16), after[key].view(torch.int16)), key


def test_no_key_that_is_carried_on_is_said_to_be_lost(folder: Path) -> None:
    notes = open_hf(folder).notes()
    assert notes == ("keys of config.json that are not carried on: num_logits_to_keep, z_loss_coefficient",)


# -- dead units -------------------------------------------------------------------------------------------------------


def test_cutting_mamba_heads_that_give_nothing_changes_no_logit(tmp_path: Path, here: Runtime) -> None:
    """As in Nemotron-H: the norm of their group is scaled for fewer channels, whose epsilon is small here."""
    tiny.write_bamba(tmp_path / "alive", rms_norm_eps=1e-14, mamba_n_groups=2)
    model = loaded(tmp_path / "alive")
    before = hf_logits(model)
    dead = (1, 3, 4, 6)  # two of each group of four
    rows = torch.tensor([head * 16 + channel for head in dead for channel in range(16)])
    state = model.state_dict()
    for layer in (0, 2, 4):
        state[f"model.layers.{layer}.mamba.in_proj.weight"][128 + rows] = 0.0
        state[f"model.layers.{layer}.mamba.conv1d.bias"][rows] = 0.0
    expected = hf_logits(model)
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "dead")
    source = open_hf(tmp_path / "dead")
    plan = PruningPlan.keep_all(source.spec)
    layers = list(plan.layers)
    for layer in (0, 2, 4):
        kept = {**layers[layer].kept, Axis.MAMBA_HEAD: (0, 2, 5, 7)}
        layers[layer] = LayerPlan(source=layer, kept=kept)
    pruned = PrunedSource(source, replace(plan, layers=tuple(layers)))
    whole, cut = (megatron_logits(each, here, torch.float64) for each in (source, pruned))
    assert (whole - cut).abs().max() < 1e-6 * whole.square().mean().sqrt()
    write_hf(pruned, tmp_path / "pruned")
    torch.testing.assert_close(hf_logits(loaded(tmp_path / "pruned")), expected, rtol=1e-5, atol=1e-5)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_the_class_cannot_be_told_is_refused_by_name(folder: Path) -> None:
    """`mamba_expand` is a whole number: heads times channels are a multiple of the hidden size."""
    spec = open_hf(folder).spec
    with pytest.raises(SpecError, match=r"cannot have 8 Mamba heads of 16 channels with hidden_size = 48"):
        BAMBA.write_config(spec.with_sizes(hidden_size=48))
    without = (*spec.layers[:4], spec.layers[4].without("feed_forward"))
    with pytest.raises(SpecError, match=r"does not compute layers of Mamba alone \(layer 4 first\)"):
        BAMBA.write_config(replace(spec, layers=without))
    uneven = (*spec.layers[:4], spec.layers[4].with_sizes(mamba_num_heads=4))
    with pytest.raises(SpecError, match="the model's layers differ in mamba_num_heads"):
        BAMBA.write_config(replace(spec, layers=uneven))
    limited = tuple(
        replace(layer, mixer=replace(layer.mamba, dt_min=0.001)) if isinstance(layer.mixer, Mamba) else layer
        for layer in spec.layers
    )
    with pytest.raises(SpecError, match=r"does not compute dt_min = 0\.001"):
        BAMBA.write_config(replace(spec, layers=limited))


def test_one_group_cannot_be_split_over_tensor_parallel_ranks() -> None:
    spec = BAMBA.read_config(BAMBA_9B)
    check_layout(spec, ParallelConfig(pipeline=8))
    with pytest.raises(LayoutError, match=r"mamba_num_groups = 1 of layer 0 is not a multiple of parallel\.tensor = 2"):
        check_layout(spec, ParallelConfig(tensor=2))
    check_layout(spec, ParallelConfig(context=128))  # a head a rank
    with pytest.raises(LayoutError, match=r"mamba_num_heads = 128 of layer 0 is not a multiple of 256"):
        check_layout(spec, ParallelConfig(context=256))


def test_every_row_has_a_name_in_the_family(folder: Path) -> None:
    spec = open_hf(folder).spec
    assert {weight.row.name for weight in weights(spec)} == set(BAMBA.hf_names)
    assert all(isinstance(layer, LayerSpec) and isinstance(layer.feed_forward, Mlp) for layer in spec.layers)
