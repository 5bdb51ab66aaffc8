"""Small checkpoints: random weights on demand, and folders as other tools write them."""

import hashlib
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from nemo_minitron.arch.families import nearest_family
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weights
from nemo_minitron.checkpoints.source import TensorSource


class RandomSource:
    """Weights drawn on demand; counts how many of its tensors are alive at a time."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> None:
        self.spec, self.dtype = spec, dtype
        self.family = nearest_family(spec)
        self.lineage: dict[str, Any] = {"base_model": "a/b", "license": "mit"}
        self.alive = self.most_alive = 0
        self._lock = threading.RLock()

    def names(self) -> tuple[str, ...]:
        return tuple(weight.name for weight in weights(self.spec))

    def get(self, name: str) -> torch.Tensor:
        shape = {weight.name: weight.shape for weight in weights(self.spec)}[name]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        with self._lock:
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(tensor, self._gone)
        return tensor

    def tokenizer_files(self) -> dict[str, bytes]:
        return {"tokenizer.json": b'{"model": {"vocab": {"a": 0}}}', "generation_config.json": b"{}"}

    def _gone(self) -> None:
        with self._lock:
            self.alive -= 1


UNIFORM = ModelSpec(
    vocab_size=40,
    hidden_size=24,
    head_dim=8,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=20),) * 3,
    max_position_embeddings=64,
)


UNEVEN = replace(
    UNIFORM,
    layers=(
        transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=20),
        transformer_layer(num_attention_heads=2, num_query_groups=1, ffn_hidden_size=12),
    ),
    tied_embeddings=True,
    qkv_bias=True,
)


def equal(one: TensorSource, other: TensorSource) -> bool:
    return one.names() == other.names() and all(torch.equal(one.get(n), other.get(n)) for n in one.names())


def _foreign(path: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    """A NeMo-1 folder by torch's own writer: complete stacked tensors, none of our keys."""
    path.mkdir()
    keys = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 20,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "max_position_embeddings": 64,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "bias": False,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        **config,
    }
    (path / "model_config.yaml").write_text(yaml.safe_dump(keys))
    (path / "0123456789abcdef0123456789abcdef_tokenizer.model").write_bytes(b"pieces")
    dcp.save(
        state,
        storage_writer=dcp.FileSystemWriter(path / "model_weights"),
        planner=DefaultSavePlanner(flatten_state_dict=False),
        no_dist=True,
    )
    (path / "model_weights" / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    return path


def _foreign_state(source: RandomSource, prefix: str = "model.") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for weight in weights(source.spec):
        if weight.layer is None:
            state[prefix + weight.name] = source.get(weight.name)
        elif weight.layer == 0:
            same = [source.get(weight.row.name.format(i=i)) for i in range(source.spec.num_layers)]
            state[prefix + weight.row.name.replace(".{i}", "")] = torch.stack(same)
    return state
