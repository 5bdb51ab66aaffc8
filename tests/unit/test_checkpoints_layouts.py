"""NeMo-1's five layouts and Hugging Face's torch bins, each made here with torch and tar alone, then read."""

import io
import json
import sys
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weights
from nemo_minitron.checkpoints.nemo1 import NemoSource
from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.errors import CheckpointError
from tests import tiny
from tests.unit.test_checkpoints_nemo1 import UNIFORM, RandomSource, equal

COLUMN = ("word_embeddings.weight", "linear_qkv.weight", "linear_fc1.weight", "output_layer.weight")
ROW = ("linear_proj.weight", "linear_fc2.weight")
OLD_NAMES = (
    ("embedding.", "language_model.embedding."),
    ("decoder.final_layernorm", "language_model.encoder.final_layernorm"),
    ("decoder.", "language_model.encoder."),
    ("output_layer", "language_model.output_layer"),
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "post_attention_layernorm."),
    ("linear_qkv", "query_key_value"),
    ("linear_proj", "dense"),
    ("linear_fc1", "dense_h_to_4h"),
    ("linear_fc2", "dense_4h_to_h"),
)
LOCAL_NAMES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)


def shard(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What a tensor-parallel rank holds."""
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if name.endswith(COLUMN):
        return tensor.chunk(size)[rank].clone()
    return tensor.chunk(size, dim=1)[rank].clone() if name.endswith(ROW) else tensor


def write_ranks(root: Path, source: RandomSource, layout: str) -> None:
    """`model_weights.ckpt` of each rank, layers counted from 0 on every stage."""
    folders, tp, pp, renames = RANKS[layout]
    per_stage = source.spec.num_layers // pp
    for folder, (tensor_rank, stage) in folders.items():
        state: dict[str, Any] = {}
        for weight in weights(source.spec):
            name = weight.name
            if weight.layer is None:
                if stage != (0 if name.startswith("embedding") else pp - 1):
                    continue
            elif weight.layer // per_stage != stage:
                continue
            else:
                name = name.replace(f".{weight.layer}.", f".{weight.layer % per_stage}.")
            stored = name
            for old, new in renames:
                stored = stored.replace(old, new)
            state["model." + stored] = shard(name, source.get(weight.name), tensor_rank, tp)
        if not renames:
            state["model.decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"fp8 scales")
            state["model.rotary_pos_emb.inv_freq"] = torch.ones(4)
        if source.spec.tied_embeddings and pp > 1 and stage == pp - 1:
            embedding = source.get("embedding.word_embeddings.weight")
            state["model.word_embeddings.weight"] = shard("word_embeddings.weight", embedding, tensor_rank, tp)
        (root / folder).mkdir(parents=True, exist_ok=True)
        torch.save(state, root / folder / "model_weights.ckpt")


def write_config(root: Path, spec: ModelSpec) -> None:
    layer = spec.layers[0]
    keys = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": layer.ffn_hidden_size,
        "num_attention_heads": layer.num_attention_heads,
        "num_query_groups": layer.num_query_groups,
        "kv_channels": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        "bias": False,
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    }
    (root / "model_config.yaml").write_text(yaml.safe_dump(keys))


def pack(root: Path, file: Path) -> Path:
    with tarfile.open(file, "w:") as archive:
        archive.add(root, arcname=".")
    return file


FOUR_LAYERS = UNIFORM.with_sizes(num_layers=4)
RANKS = {
    "plain": ({"": (0, 0)}, 1, 1, ()),
    "plain, local names": ({"": (0, 0)}, 1, 1, LOCAL_NAMES),
    "mp_rank": ({f"mp_rank_{rank:02d}": (rank, 0) for rank in range(2)}, 2, 1, ()),
    "tp_rank, old names": ({f"tp_rank_{rank:02d}": (rank, 0) for rank in range(2)}, 2, 1, OLD_NAMES),
    "tp and pp": ({f"tp_rank_{t:02d}_pp_rank_{p:03d}": (t, p) for t in range(2) for p in range(2)}, 2, 2, ()),
}


@pytest.mark.parametrize("layout", RANKS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_file_a_rank_is_merged(tmp_path: Path, layout: str, tied: bool) -> None:
    spec = replace(FOUR_LAYERS, tied_embeddings=tied)
    source = RandomSource(spec, torch.bfloat16)
    write_ranks(tmp_path / "x", source, layout)
    write_config(tmp_path / "x", spec)
    read = NemoSource(pack(tmp_path / "x", tmp_path / "x.nemo"))
    assert (read.spec, read.dtype) == (spec, torch.bfloat16)
    assert equal(read, source)
    assert not read.is_native
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


def write_zarr(folder: Path, source: RandomSource, *, compressor: Any = None) -> None:
    """Stacked arrays cut as two tensor-parallel ranks and one layer a chunk would; a padded edge in the vocabulary."""
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    torch.save({}, folder / "common.pt")
    for weight in weights(source.spec):
        if weight.layer not in (None, 0):
            continue
        layers = range(source.spec.num_layers) if weight.layer == 0 else [None]
        tensors = [source.get(weight.name if i is None else weight.row.name.format(i=i)) for i in layers]
        whole = tensors[0] if weight.layer is None else torch.stack(tensors)
        rows = 16 if weight.layer is None else 1
        chunks = [rows, *whole.shape[1:]] if whole.ndim < 3 else [1, -(-whole.shape[1] // 2), whole.shape[2]]
        path = folder / ("model." + weight.name.replace(".layers.0.", ".layers."))
        path.mkdir()
        header = {
            "zarr_format": 2,
            "shape": list(whole.shape),
            "chunks": chunks,
            "dtype": {torch.float32: "<f4", torch.bfloat16: "bfloat16"}[whole.dtype],
            "order": "C",
            "filters": None,
            "fill_value": None,
            "compressor": compressor,
        }
        (path / ".zarray").write_text(json.dumps(header))
        grid = torch.cartesian_prod(*(torch.arange(-(-n // c)) for n, c in zip(whole.shape, chunks, strict=True)))
        for place in grid.reshape(-1, whole.ndim).tolist():
            cut = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunks, strict=True))
            chunk = torch.zeros(chunks, dtype=whole.dtype)
            piece = whole[cut]
            chunk[tuple(slice(0, n) for n in piece.shape)] = piece
            data = chunk.view(torch.uint8).numpy().tobytes()
            if compressor is not None:
                data = zlib.compress(data)
            (path / ".".join(map(str, place))).write_bytes(data)


@pytest.mark.parametrize("compressor", [None, {"id": "zlib", "level": 1}], ids=["as it is", "zlib"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zarr_is_read(tmp_path: Path, dtype: torch.dtype, compressor: Any) -> None:
    source = RandomSource(UNIFORM, dtype)
    write_zarr(tmp_path / "x" / "model_weights", source, compressor=compressor)
    write_config(tmp_path / "x", UNIFORM)
    assert equal(NemoSource(pack(tmp_path / "x", tmp_path / "x.nemo")), source)
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
    with pytest.raises(CheckpointError, match=r"nemo_minitron\[zarr\]"):
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
