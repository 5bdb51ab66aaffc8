"""Megatron-Core's own loader takes what we write, strictly, at tensor parallel 2 and pipeline parallel 2."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_minitron.checkpoints.megatron_dist import write_megatron
from nemo_minitron.checkpoints.nemo1 import pack_nemo, write_folder
from nemo_minitron.checkpoints.nemo2 import write_nemo2
from nemo_minitron.checkpoints.open import open_checkpoint
from tests import tiny
from tests.parallel.strict_load_job import load_strictly
from tests.ranks import run_on_ranks

LOCAL = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
COLUMN = ("word_embeddings.weight", "linear_qkv.weight", "output_layer.weight")
ROW = ("linear_proj.weight", "linear_fc2.weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("strict")
    tiny.write_llama(root / "hf", tied=False)
    source = open_checkpoint(root / "hf")
    write_folder(source, root / "folder")
    pack_nemo(root / "folder", root / "x.nemo")
    with tarfile.open(root / "x.nemo") as archive:
        archive.extractall(root / "nemo", filter="data")
    write_nemo2(source, root / "nemo2")
    write_megatron(source, root / "megatron")
    return root


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)], ids=["TP 2", "PP 2"])
def test_every_rank_gets_its_shard(folders: Path, tensor: int, pipeline: int) -> None:
    places = {
        "model.": str(folders / "nemo" / "model_weights"),
        "module.": str(folders / "nemo2" / "weights"),
        "": str(folders / "megatron" / "iter_0000001"),
    }
    ranks = run_on_ranks(2, load_strictly, places, tensor, pipeline)
    source = open_checkpoint(folders / "hf")
    for prefix in places:
        held = [set(rank[prefix]) for rank in ranks]
        assert {canonical(name) for name in held[0] | held[1]} == set(source.names())
        assert held[0].isdisjoint(held[1]) == (pipeline == 2)
        for number, rank in enumerate(ranks):
            for name, values in rank[prefix].items():
                whole = source.get(canonical(name))
                expected = shard(canonical(name), whole, number) if tensor == 2 else whole
                np.testing.assert_array_equal(values, expected.float().numpy(), err_msg=name)


def canonical(name: str) -> str:
    for local, other in LOCAL.items():
        name = name.replace(local, other)
    return name


def shard(name: str, tensor: Tensor, rank: int) -> Tensor:
    """What Megatron gives a tensor-parallel rank of two."""
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(2)[rank] for half in tensor.chunk(2)])
    if name.endswith(COLUMN):
        return tensor.chunk(2)[rank]
    return tensor.chunk(2, dim=1)[rank] if name.endswith(ROW) else tensor
