"""NeMo-1's five layouts and Hugging Face's torch bins, each made here with torch and tar alone, then read."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.checkpoints.nemo1 import open_nemo
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.errors import CheckpointError
from tests import tiny
from tests.support.checkpoints import UNIFORM, RandomSource, equal
from tests.support.layouts import FOUR_LAYERS, RANKS, pack, write_config, write_ranks, write_zarr


@pytest.mark.parametrize("layout", RANKS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_file_a_rank_is_merged(tmp_path: Path, layout: str, tied: bool) -> None:
    spec = replace(FOUR_LAYERS, tied_embeddings=tied)
    source = RandomSource(spec, torch.bfloat16)
    write_ranks(tmp_path / "x", source, layout)
    write_config(tmp_path / "x", spec)
    read = open_nemo(pack(tmp_path / "x", tmp_path / "x.nemo"))
    assert (read.spec, read.dtype) == (spec, torch.bfloat16)
    assert equal(read, source)
    assert read.native is None
    assert equal(open_checkpoint(tmp_path / "x"), source)


def test_a_rank_that_is_missing_or_differs_is_told(tmp_path: Path) -> None:
    write_config(tmp_path, FOUR_LAYERS)
    write_ranks(tmp_path, RandomSource(FOUR_LAYERS), "tp and pp")
    file = tmp_path / "tp_rank_01_pp_rank_001" / "model_weights.ckpt"
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(CheckpointError, match="some ranks are missing"):
        open_checkpoint(tmp_path)
    state = torch.load(io.BytesIO(whole), weights_only=False)
    torch.save({name: value for name, value in state.items() if "fc2" not in name}, file)
    with pytest.raises(CheckpointError, match="holds other weights than"):
        open_checkpoint(tmp_path)
    name = "model.decoder.final_layernorm.weight"
    torch.save({**state, name: torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match="different shapes on its ranks"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("compressor", [None, {"id": "zlib", "level": 1}], ids=["as it is", "zlib"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zarr_is_read(tmp_path: Path, dtype: torch.dtype, compressor: Any) -> None:
    source = RandomSource(UNIFORM, dtype)
    write_zarr(tmp_path / "x" / "model_weights", source, compressor=compressor)
    write_config(tmp_path / "x", UNIFORM)
    assert equal(open_nemo(pack(tmp_path / "x", tmp_path / "x.nemo")), source)
    assert equal(open_checkpoint(tmp_path / "x"), source)


def test_damaged_zarr_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zarr(tmp_path / "model_weights", RandomSource(UNIFORM))
    write_config(tmp_path, UNIFORM)
    array = tmp_path / "model_weights" / "model.decoder.layers.mlp.linear_fc2.weight"
    header = json.loads((array / ".zarray").read_text())
    cases: dict[str, dict[str, Any]] = {
        "no filters": {"filters": [{"id": "pickle"}]},
        "compressor": {"compressor": {"id": "pickle"}},
        "type <i8": {"dtype": "<i8"},
        "whole numbers": {"chunks": [0, 1, 1]},
        "each chunk is a file": {"chunks": [1, 1, 1], "shape": [10**6, 10**6, 10**6]},
        "plain array": {"order": "F"},
        "shaped": {"shape": [3, 24, 19]},
    }
    for words, changes in cases.items():
        (array / ".zarray").write_text(json.dumps(header | changes))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path)
    (array / ".zarray").write_text(json.dumps(header | {"compressor": {"id": "blosc"}}))
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    with pytest.raises(CheckpointError, match=r"pip install -e '.\[zarr\]'"):
        open_checkpoint(tmp_path).get("decoder.layers.0.mlp.linear_fc2.weight")
    (array / ".zarray").write_text(json.dumps(header))
    (array / "2.0.0").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 of"):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny.write_llama(tmp_path_factory.mktemp("bins") / "hf", tied=False)
    return tmp_path_factory.getbasetemp() / "bins0" / "hf"


@pytest.mark.parametrize("shards", [1, 3])
def test_torch_bins_are_read_as_transformers_reads_them(hf: Path, tmp_path: Path, shards: int) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    state = dict(model.state_dict())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((hf / name).read_bytes())
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].T.contiguous().T  # stored with other strides
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if shards == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
        placed = {key: names[i % shards] for i, key in enumerate(state)}
        for file in names:
            torch.save({key: state[key] for key in state if placed[key] == file}, tmp_path / file)
        index = {"metadata": {}, "weight_map": placed}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    read = open_checkpoint(tmp_path)
    assert read.dtype is torch.bfloat16
    for name in read.names():
        assert torch.equal(read.get(name), open_checkpoint(hf).get(name).bfloat16()), name


def test_bins_that_cannot_be_read_say_why(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"no model\.safetensors, pytorch_model\.bin"):
        open_checkpoint(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"since torch 1\.6"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()  # beside an index it would be a second model
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "pytorch_model-00001-of-00002.bin"}}')
    with pytest.raises(CheckpointError, match=r"00002\.bin: no such file"):
        open_checkpoint(tmp_path)


def test_only_the_wanted_tensor_of_a_bin_is_read(hf: Path, tmp_path: Path) -> None:
    """One tensor's bytes, and no others, may be damaged without the rest noticing."""
    from nemo_minitron.checkpoints.files import FolderFiles
    from nemo_minitron.checkpoints.torch_file import TorchFile

    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.full((1000,), 7.0)}
    shared = torch.arange(10, dtype=torch.float16)
    state |= {"c": shared[2:6], "d": shared.view(5, 2)}
    torch.save(state, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(data.replace(torch.full((1000,), 7.0).numpy().tobytes(), b"\xff" * 4000))
    file = TorchFile(FolderFiles(tmp_path), "x.bin")
    assert all(torch.equal(file.get(name), state[name]) for name in "acd")
    assert file.get("b").isnan().all()
