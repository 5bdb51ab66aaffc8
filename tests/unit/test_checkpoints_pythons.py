"""Pickles that other versions of Python write, and ours, which depend on none."""

import argparse
import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from nemo_minitron.checkpoints.pickles import read_common, read_metadata
from nemo_minitron.checkpoints.torch_dist import TorchDistWriter, write_index
from nemo_minitron.errors import CheckpointError


class OlderPickler(pickle._Pickler):
    """Stores a member of an enumeration as Python 3.11.0 to 3.11.3 do: `getattr(class, name)`."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def dumped(value: Any, *, protocol: int = 4) -> bytes:
    file = io.BytesIO()
    OlderPickler(file, protocol).dump(value)
    return file.getvalue()


def index_of_one() -> Metadata:
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size((2, 3)), chunks=[])
    return Metadata({"w": entry}, storage_data={})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_index_with_enumerations_of_python_3_11_2_is_read(protocol):
    data = dumped(index_of_one(), protocol=protocol)
    assert b"getattr" in data
    entry = read_metadata(data, where="x").state_dict_metadata["w"]
    assert (entry.properties.dtype, tuple(entry.size)) == (torch.bfloat16, (2, 3))
    assert entry.properties.memory_format is torch.contiguous_format


def test_our_index_is_the_same_bytes_under_such_a_pickler(tmp_path, monkeypatch):
    write_index(tmp_path, index_of_one())
    ours = (tmp_path / ".metadata").read_bytes()
    monkeypatch.setattr(Enum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    assert b"getattr" in pickle.dumps(index_of_one(), protocol=4)
    write_index(tmp_path, index_of_one())
    assert (tmp_path / ".metadata").read_bytes() == ours
    assert b"getattr" not in ours


def test_our_index_holds_no_path(tmp_path):
    with TorchDistWriter(tmp_path) as writer:
        writer.add("w", torch.zeros(2))
    data = (tmp_path / ".metadata").read_bytes()
    assert b"pathlib" not in data
    assert str(tmp_path).encode() not in data


@pytest.mark.parametrize("protocol", [2, 4])
def test_arguments_of_a_training_may_hold_such_enumerations(protocol, tmp_path):
    from megatron.core.transformer.enums import AttnBackend

    args = argparse.Namespace(num_layers=2, attention_backend=AttnBackend.flash)
    found = read_common(dumped({"args": args}, protocol=protocol), where="common.pt")
    assert found["args"]["num_layers"] == 2
    assert found["args"]["attention_backend"].endswith("AttnBackend.flash")


class Attribute:
    """Pickles as a call of `getattr`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Metadata, "__init__"),
        (torch.Size, "numel"),
        (Path("x"), "touch"),
        (torch.float32, "itemsize"),
        ("text", "format"),
    ],
)
def test_getattr_gives_members_of_enumerations_and_nothing_else(owner, name):
    with pytest.raises(CheckpointError, match=r"asks for builtins\.getattr"):
        read_metadata(pickle.dumps([Attribute(owner, name)], protocol=4), where="x")


@pytest.mark.parametrize("name", ["__class__", "__init__", "mro", "_missing_", "absent"])
def test_getattr_of_an_enumeration_gives_members_only(name):
    from torch.distributed.checkpoint.planner import WriteItemType

    with pytest.raises(CheckpointError, match=r"asks for builtins\.getattr"):
        read_metadata(pickle.dumps(Attribute(WriteItemType, name), protocol=4), where="x")
