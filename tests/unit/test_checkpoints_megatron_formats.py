"""NeMo-2 and Megatron folders: bytes there and back for every family, and folders made by code of others."""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from nemo_minitron.arch.families import FAMILIES
from nemo_minitron.arch.spec import Activation, ModelSpec, Norm, RopeScaling
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.megatron_dist import write_megatron
from nemo_minitron.checkpoints.nemo1 import pack_nemo, write_folder
from nemo_minitron.checkpoints.nemo2 import write_nemo2
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import CheckpointError, MinitronError, SpecError
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan
from nemo_minitron.pruning.plan import PruningPlan
from tests import tiny
from tests.support.checkpoints import UNEVEN, UNIFORM, RandomSource, _foreign, _foreign_state, equal
from tests.support.family_plans import plan_for

WEIGHTS = "model.safetensors"
HYBRID = "nemotron_h"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("formats")
    toy.cache_clear()


@cache
def toy(root: Path, family: str, tied: bool) -> Path:
    """A bf16 model that transformers saved."""
    folder = root / f"{family}_{tied}"
    if family == HYBRID:
        model = tiny.write_nemotron_h(folder)
    else:
        model = tiny.write_family(folder, family, tie_word_embeddings=tied)
    model.bfloat16().save_pretrained(folder)
    return folder


def plan(source: TensorSource) -> PruningPlan:
    if source.family != HYBRID:
        return plan_for(source)
    target = TargetConfig(random_seed=0, mamba_num_heads=4, mamba_head_dim=5, hidden_size=48, num_layers=6)
    return random_plan(target, source.spec, seed=0)


CASES = [
    (family, tied)
    for family in FAMILIES
    for tied in (True, False)
    if family in tiny.FAMILY_CONFIGS or (family == HYBRID and not tied)
]


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_bytes_through_every_format_and_back(folders: Path, tmp_path: Path, family: str, tied: bool) -> None:
    """Hugging Face, canonical, `.nemo`, NeMo 2, Megatron, Hugging Face; as it is and pruned."""
    source = open_hf(toy(folders, family, tied))
    assert (source.family, source.spec.tied_embeddings, source.dtype) == (family, tied, torch.bfloat16)
    for name, first in {"complete": source, "pruned": PrunedSource(source, plan(source))}.items():
        root = tmp_path / name
        write_hf(first, root / "hf")
        write_folder(open_checkpoint(root / "hf"), root / "canonical")
        pack_nemo(root / "canonical", root / "x.nemo")
        write_nemo2(open_checkpoint(root / "x.nemo"), root / "nemo2")
        write_megatron(open_checkpoint(root / "nemo2"), root / "megatron")
        write_hf(open_checkpoint(root / "megatron"), root / "back")
        files = sorted(path.name for path in (root / "hf").iterdir())
        assert files == sorted(path.name for path in (root / "back").iterdir())
        for file in files:
            assert (root / "back" / file).read_bytes() == (root / "hf" / file).read_bytes(), file
    assert (tmp_path / "complete" / "back" / WEIGHTS).read_bytes() == (
        toy(folders, family, tied) / WEIGHTS
    ).read_bytes()


SPECS = {
    "uniform": UNIFORM,
    "llama 3.2": replace(UNIFORM, rope_scaling=RopeScaling(factor=32.0), tied_embeddings=True),
    "qwen2": replace(UNIFORM, qkv_bias=True),
    "qwen3": replace(UNIFORM, qk_norm=True),
    "nemotron": replace(UNIFORM, activation=Activation.SQUARED_RELU, norm=Norm.LAYERNORM1P, rotary_percent=0.5),
    "mistral": replace(
        UNIFORM,
        sliding_window=5,
        layers=tuple(layer.looking_back(local=True) for layer in UNIFORM.layers),
    ),
}


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("described", ["model.yaml", "io.json", "run_config.yaml", "common.pt"])
def test_the_words_of_others_alone_describe_the_model(tmp_path: Path, case: str, described: str) -> None:
    """What other tools read is enough: without `minitron.json` the same architecture is read back."""
    spec = SPECS[case]
    source = RandomSource(spec)
    write = write_nemo2 if described in ("model.yaml", "io.json") else write_megatron
    write(source, tmp_path / "x")
    next((tmp_path / "x").rglob("minitron.json")).unlink()
    if described == "io.json":
        (tmp_path / "x" / "context" / "model.yaml").unlink()
    if described == "common.pt":
        next((tmp_path / "x").rglob("run_config.yaml")).unlink()
    read = open_checkpoint(tmp_path / "x")
    assert read.spec == spec
    assert equal(read, source)


def test_layers_of_different_sizes_survive(tmp_path: Path) -> None:
    source = RandomSource(UNEVEN, torch.bfloat16)
    write_nemo2(source, tmp_path / "nemo2")
    write_megatron(source, tmp_path / "megatron")
    for name in ("nemo2", "megatron"):
        read = open_checkpoint(tmp_path / name)
        assert (read.spec, read.lineage) == (UNEVEN, source.lineage)
        assert equal(read, source)
    config = yaml.safe_load((tmp_path / "nemo2" / "context" / "model.yaml").read_text())
    assert config["_target_"].startswith("nemo_minitron.unsayable")  # NeMo 2 must not build something else


def test_two_tensors_at_most_are_alive_per_reader(tmp_path: Path) -> None:
    """Writers ask for a tensor at a time and keep none."""
    source = RandomSource(UNIFORM)
    write_nemo2(source, tmp_path / "nemo2")
    write_megatron(source, tmp_path / "megatron")
    assert source.alive == 0


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for write in (write_nemo2, write_megatron):
        for name in ("one", "two"):
            write(RandomSource(UNIFORM), tmp_path / name / "x")
        names = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
        assert len(names) >= 7
        for name in names:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
        shutil.rmtree(tmp_path / "one")
        shutil.rmtree(tmp_path / "two")


def megatron_lm(path: Path, state: dict[str, Any], args: dict[str, Any]) -> Path:
    """An iteration as Megatron-LM saves one: its arguments in `common.pt`, optimizer state among the weights."""
    from megatron.core.enums import ModelType

    _foreign(path, state)
    (path / "model_config.yaml").unlink()
    folder = path / "iter_0000100"
    (path / "model_weights").rename(folder)
    (path / "latest_checkpointed_iteration.txt").write_text("100")
    kept = {"params_dtype": torch.bfloat16, "model_type": ModelType.encoder_or_decoder, "start": Path("/x"), **args}
    training = {"opt_param_scheduler": {"num_steps": 3}, "iteration": 100, "checkpoint_version": 3.0}
    torch.save({"args": argparse.Namespace(**kept), **training}, folder / "common.pt")
    return path


LM_ARGS: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_hidden_size": 20,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "max_position_embeddings": 64,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 40,
    "padded_vocab_size": 64,
    "activation_func": torch.nn.functional.silu,
}


MAMBA = {"mamba_head_dim": 8, "mamba_state_dim": 4, "mamba_num_groups": 2}


def lm_state(spec: ModelSpec) -> dict[str, Any]:
    state = _foreign_state(RandomSource(spec), prefix="")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name] = torch.cat([state[name], torch.full((24, 24), torch.nan)])
    state["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(24)
    state["optimizer.state.step"] = torch.tensor(3.0)
    return state


def test_a_training_of_megatron_lm_is_read(tmp_path: Path) -> None:
    path = megatron_lm(tmp_path / "x", lm_state(UNIFORM), LM_ARGS)
    for folder in (path, path / "iter_0000100"):
        read = open_checkpoint(folder)
        assert read.format == "Megatron"
        assert read.spec == UNIFORM
        assert equal(read, RandomSource(UNIFORM))
    (path / "latest_checkpointed_iteration.txt").unlink()
    assert open_checkpoint(path).spec == UNIFORM


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 8, "moe_router_num_groups": 2}, "moe_router_num_groups"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"ffn_hidden_size": "20"}, r"common\.pt"),
        ({"is_hybrid_model": True}, "a hybrid without hybrid_override_pattern"),
        ({"hybrid_mlp_ratio": 0.5}, "a hybrid without hybrid_override_pattern"),
        ({"hybrid_override_pattern": "M-X"}, "hybrid_override_pattern = 'M-X' is not supported"),
        ({"hybrid_override_pattern": "M-E", **MAMBA}, "names layers of experts, and there are none"),
        (
            {"hybrid_override_pattern": "M-E", **MAMBA, "num_experts": 4, "moe_latent_size": 8},
            "moe_latent_size = '8' is not supported",
        ),
        ({"hybrid_override_pattern": "M-*/M"}, "hybrid_override_pattern = 'M-\\*/M' is not supported"),
        ({"hybrid_override_pattern": "M-*-"}, "names 4 layers, num_layers = 3"),
        ({"hybrid_override_pattern": "M-*"}, "mamba_head_dim = None"),
        ({"hybrid_override_pattern": "M-*", **MAMBA, "mamba_num_groups": 0}, "mamba_num_groups = 0"),
        ({"hybrid_override_pattern": "M-*", **MAMBA, "norm_epsilon": 1e-6}, "epsilon is 1e-06, and that of Megatron"),
        ({"hybrid_layer_pattern": "M-*"}, "hybrid_layer_pattern"),
    ],
)
def test_what_cannot_be_read_from_arguments_is_told(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = megatron_lm(tmp_path / "x", lm_state(UNIFORM), LM_ARGS | changes)
    with pytest.raises(MinitronError, match=words):
        open_checkpoint(path)


def test_iterations_that_are_not_there_are_told(tmp_path: Path) -> None:
    path = megatron_lm(tmp_path / "x", lm_state(UNIFORM), LM_ARGS)
    for word in ("7", "../../etc", "release", "x" * 100):
        (path / "latest_checkpointed_iteration.txt").write_text(word)
        with pytest.raises(CheckpointError, match="names"):
            open_checkpoint(path)


def test_a_config_that_contradicts_ours_is_refused(tmp_path: Path) -> None:
    write_nemo2(RandomSource(UNIFORM), tmp_path / "x")
    file = tmp_path / "x" / "context" / "model.yaml"
    file.write_text(file.read_text().replace("hidden_size: 24", "hidden_size: 32"))
    with pytest.raises(SpecError, match="hidden_size = 32"):
        open_checkpoint(tmp_path / "x")


def test_a_nemo2_folder_by_torch_and_fiddle_words_is_read(tmp_path: Path) -> None:
    """Weights by torch's own writer, and a context with a reference shared between two objects."""
    _foreign(tmp_path / "x", _foreign_state(RandomSource(UNIFORM), prefix="module."))
    (tmp_path / "x" / "model_config.yaml").unlink()
    (tmp_path / "x" / "model_weights").rename(tmp_path / "x" / "weights")
    write_nemo2(RandomSource(UNIFORM), tmp_path / "ours")
    context = tmp_path / "ours" / "context"
    document = json.loads((context / "io.json").read_text())
    document["objects"]["trainer_1"] = {"type": {"type": "pyref", "module": "nemo", "name": "Trainer"}, "items": []}
    (tmp_path / "x" / "context").mkdir()
    (tmp_path / "x" / "context" / "io.json").write_text(json.dumps(document))
    read = open_checkpoint(tmp_path / "x")
    assert read.format == "NeMo 2"
    assert read.spec == UNIFORM
    assert equal(read, RandomSource(UNIFORM))


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    source = RandomSource(UNIFORM)
    write_nemo2(source, tmp_path / "nemo2")
    write_megatron(source, tmp_path / "megatron")
    for prefix, folder in {"module.": "nemo2/weights", "": "megatron/iter_0000001"}.items():
        state = {f"{prefix}decoder.layers.mlp.linear_fc2.weight": torch.zeros(3, 24, 20)}
        dcp.load(state, checkpoint_id=tmp_path / folder, no_dist=True)
        expected = torch.stack([source.get(f"decoder.layers.{i}.mlp.linear_fc2.weight") for i in range(3)])
        assert torch.equal(state[f"{prefix}decoder.layers.mlp.linear_fc2.weight"], expected)
