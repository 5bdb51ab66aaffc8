"""Weights as NeMo 1 laid them out: one file per rank, zarr arrays, archives."""

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weights
from tests.support.checkpoints import UNIFORM, RandomSource

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
        "ffn_hidden_size": layer.mlp.ffn_hidden_size,
        "num_attention_heads": layer.attention.num_attention_heads,
        "num_query_groups": layer.attention.num_query_groups,
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
