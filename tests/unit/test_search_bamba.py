"""Searches over Bamba, which has an MLP behind every mixer: exact counts, and shapes that its class can be told."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig

from nemo_minitron.arch.families import BAMBA, family_of_hf_config
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import open_hf
from nemo_minitron.cli import recipes
from nemo_minitron.config.budget import DeploymentConfig
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.sizes import student_spec
from nemo_minitron.search.axes import sizes_of
from nemo_minitron.search.measures import measures
from nemo_minitron.search.problem import pose, sized_target
from tests.support.scores import sums
from tests.tiny import write_bamba

OF_TINY = ("hidden_size", "ffn_hidden_size", "mamba_num_heads", "mamba_head_dim")
"""Sizes that the tiny recipe gives."""
NEMO_ONLY = "export.formats=[nemo]"


def random_bamba(rng: random.Random) -> BambaConfig:
    groups, mamba_groups, layers = rng.choice([1, 2, 4]), rng.choice([1, 2, 4]), rng.randint(2, 6)
    heads, channels = mamba_groups * rng.randint(1, 3), 8 * rng.randint(1, 4)
    return BambaConfig(
        vocab_size=16 * rng.randint(8, 40),
        hidden_size=heads * channels,
        intermediate_size=8 * rng.randint(1, 20),
        num_hidden_layers=layers,
        attn_layer_indices=sorted(rng.sample(range(layers), rng.randint(1, layers - 1))),
        num_attention_heads=groups * rng.randint(1, 3),
        num_key_value_heads=groups,
        head_dim=8 * rng.randint(1, 3),
        max_position_embeddings=128,
        mamba_n_heads=heads,
        mamba_d_head=channels,
        mamba_n_groups=mamba_groups,
        mamba_d_state=8 * rng.randint(1, 4),
        mamba_expand=1,
        mamba_chunk_size=16,
    )


@pytest.mark.parametrize("number", range(4))
def test_counts_are_those_of_built_bambas(number: int) -> None:
    config = random_bamba(random.Random(number))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    data = config.to_dict()
    spec = family_of_hf_config(data).read_config(data)
    assert list(spec.kinds) == ["mamba_dense", "dense"]
    teacher = replace(spec, layers=spec.layers * 2).with_sizes(hidden_size=256, ffn_hidden_size=300)
    found = measures(teacher, DeploymentConfig(sequence_length=10), ["params", "kv_cache", "ssm_state"])
    sizes = sizes_of(spec)
    assert found["params"](sizes) == model.num_parameters()
    attention = len(config.attn_layer_indices)
    assert found["kv_cache"](sizes) == attention * 10 * 2 * config.num_key_value_heads * config.head_dim * 2
    inner, maps = config.hidden_size, config.mamba_n_groups * config.mamba_d_state
    state = inner * config.mamba_d_state * 4 + (inner + 2 * maps) * 4 * 2
    assert found["ssm_state"](sizes) == (config.num_hidden_layers - attention) * state


def test_a_search_over_bamba_takes_shapes_that_its_class_can_be_told(tmp_path: Path) -> None:
    """Heads times their channels are a multiple of the hidden size where the student goes to Hugging Face."""
    write_bamba(tmp_path, num_hidden_layers=8, attn_layer_indices=[2, 5])
    space = ["search.space.hidden_size=[32, 48, 64]", "search.space.mamba_head_dim=[8, 12, 16]"]
    given = [f"model.source={tmp_path}", "data.sources=[texts]", "search.candidates=40", "search.tolerance=0.3"]
    cleared = [*(f"target.{name}=null" for name in ("num_layers", *OF_TINY)), "target.depth_metric=block_influence"]
    recipe = recipes.find("tiny/hybrid_cpu")
    config = load_recipe(recipe, [*given, *cleared, *space, "target.ratio=0.6"])
    source = open_hf(tmp_path)
    problem = pose(config, source.spec)
    assert [axis.key for axis in problem.space.axes][:2] == ["num_mamba_dense_layers", "num_dense_layers"]
    specs = [problem.spec(candidate.sizes) for candidate in problem.candidates]
    assert len({spec.hidden_size for spec in specs}) > 1
    assert len({tuple(spec.kinds.values()) for spec in specs}) > 1
    for candidate, spec in zip(problem.candidates, specs, strict=True):
        assert BAMBA.read_config(BAMBA.write_config(spec)) == spec
        assert problem.measured["params"](candidate.sizes) == parameter_count(spec)
        assert candidate.name.startswith(f"LMD{spec.kinds['mamba_dense']}-LD{spec.kinds['dense']}-H{spec.hidden_size}-")
    first = problem.candidates[0]
    sized = sized_target(config.target, problem.space.named(first.sizes))
    student = build_plan(Scores(source.spec, sums(source.spec)[0]), sized, source.spec).student
    assert (sizes_of(student), student.kinds) == (first.sizes, specs[0].kinds)
    everywhere = pose(load_recipe(recipe, [*given, *cleared, *space, "target.ratio=0.6", NEMO_ONLY]), source.spec)
    assert len(everywhere.found.shapes) > len(problem.found.shapes)
    narrow = ["search.space.hidden_size=48", "search.space.mamba_head_dim=16", "search.space.mamba_num_heads=8"]
    impossible = load_recipe(recipe, [*given, *cleared, *narrow, "target.ratio=0.6"])
    with pytest.raises(SearchError, match=r"none of .* combinations of sizes is one that a model can have"):
        pose(impossible, source.spec)
    counts = student_spec(TargetConfig(num_mamba_dense_layers=4, num_dense_layers=1), source.spec).kinds
    assert counts == {"mamba_dense": 4, "dense": 1}
