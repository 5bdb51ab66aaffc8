"""Hybrids as Megatron-Core's own MambaModel stores them, at tensor and pipeline parallel 2, in both of its formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from nemo_minitron.arch.layer import Attention, Mamba, Mlp, Moe, RouterScore
from nemo_minitron.arch.spec import Activation
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.runtime import Runtime
from tests.parallel.mamba_model_job import (
    EXPERTS,
    NUM_EXPERTS,
    PATTERN,
    REPLICATED,
    ROWS,
    SIZES,
    VOCAB,
    save_hybrids,
)
from tests.ranks import run_on_ranks
from tests.support.expert_models import loaded
from tests.support.loaded import megatron_model

pytestmark = pytest.mark.slow

FIELDS = {
    "_target_": "nemo.collections.llm.gpt.model.ssm.NemotronHConfigBase",
    **SIZES,
    **EXPERTS,
    "num_moe_experts": NUM_EXPERTS,
    "hybrid_override_pattern": PATTERN,
    "position_embedding_type": "none",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "activation_func": {"_target_": "nemo.collections.llm.fn.activation.squared_relu", "_call_": False},
    "gated_linear_unit": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "share_embeddings_and_output_weights": False,
    "seq_length": 64,
    "vocab_size": VOCAB,
}
"""NeMo 2's words for the same model."""

ROW_PARALLEL = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    """The folders, and what each rank held."""
    root = tmp_path_factory.mktemp("mamba_model")
    # Spawned: Megatron notes at its import which libraries there are.
    ranks = run_on_ranks(2, save_hybrids, str(root), interpret=True)
    (root / "nemo2" / "context").mkdir()
    model = {"_target_": "nemo.collections.llm.gpt.model.ssm.MambaModel", "config": FIELDS}
    (root / "nemo2" / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    return root, ranks


def whole(name: str, ranks: list[dict[str, Any]]) -> Tensor:
    """A parameter out of what the ranks held: of the input projection and the convolution each rank has its share of
    every part."""
    parts = [torch.from_numpy(rank[name]) for rank in ranks if name in rank]
    if len(parts) == 1 or name.endswith(REPLICATED):
        return parts[0]
    if name.endswith(ROW_PARALLEL):
        return torch.cat(parts, 1)
    inner, maps = 8 * 6 // 2, 4 * 5 // 2
    rows = {"in_proj": (inner, inner, maps, maps, 8 // 2), "conv1d": (inner, maps, maps)}
    sizes = next((sizes for module, sizes in rows.items() if f".{module}." in name), (len(parts[0]),))
    split = [part.split(sizes) for part in parts]
    return torch.cat([piece for pieces in zip(*split, strict=True) for piece in pieces])


@pytest.mark.parametrize(("folder", "layout"), [("tensor", "tensor"), ("pipeline", "pipeline"), ("nemo2", "tensor")])
def test_every_weight_is_read(folder: str, layout: str, saved: tuple[Path, list[dict[str, dict[str, Any]]]]) -> None:
    root, ranks = saved
    read = open_checkpoint(root / folder)
    assert read.format == ("NeMo 2" if folder == "nemo2" else "Megatron")
    held = [rank[layout] for rank in ranks]
    names = {name: name.replace("final_norm", "final_layernorm") for rank in held for name in rank}
    assert set(names.values()) == set(read.names())
    for name, canonical in names.items():
        expected = whole(name, held)
        if expected.shape[0] == ROWS:
            expected = expected[:VOCAB]
        assert torch.equal(read.get(canonical), expected), name


def test_the_pattern_and_the_sizes_are_read(saved: tuple[Path, list[dict[str, dict[str, Any]]]]) -> None:
    root, _ = saved
    spec = open_checkpoint(root / "tensor").spec
    assert open_checkpoint(root / "pipeline").spec == open_checkpoint(root / "nemo2").spec == spec
    kinds = {Mamba: "M", Attention: "*", Mlp: "-", Moe: "E"}
    assert "".join(kinds[type(part)] for layer in spec.layers for part in layer.parts) == PATTERN
    mamba = next(layer.mamba for layer in spec.layers if isinstance(layer.mixer, Mamba))
    assert mamba == Mamba(mamba_num_heads=8, mamba_head_dim=6, mamba_state_dim=5, mamba_num_groups=4)
    assert spec.layers[PATTERN.index("E")].moe == Moe(
        num_experts=3,
        expert_ffn_hidden_size=12,
        top_k=2,
        shared_ffn_hidden_size=20,
        score_function=RouterScore.SIGMOID,
        correction_bias=True,
        scaling_factor=2.5,
        router_fp32=True,
    )
    assert (spec.rotary_percent, spec.activation, spec.vocab_size) == (0.0, Activation.SQUARED_RELU, VOCAB)


@pytest.fixture
def here() -> Iterator[Runtime]:
    yield runtime.start(ParallelConfig(), seed=0)
    runtime.stop()


@torch.no_grad()
def test_exported_it_computes_in_transformers_what_it_computes_here(
    saved: tuple[Path, list[dict[str, dict[str, Any]]]], tmp_path: Path, here: Runtime
) -> None:
    """Megatron's mixer puts no limit to its steps, which `time_step_min: 0` says."""
    source = open_checkpoint(saved[0] / "tensor")
    assert source.family == "nemotron_h"
    write_hf(source, tmp_path / "hf")
    assert open_hf(tmp_path / "hf").spec == source.spec
    model = loaded(tmp_path / "hf")
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    batch = MicroBatch.of(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))
    found = megatron_model(source, here)(batch.tokens, batch.position_ids, None)
    torch.testing.assert_close(found, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)
