"""Damaged checkpoints: every reader gives a complete model or a clear refusal, never another exception.

Three kinds of damage: bits and bytes, truncation, and well-formed files that say something else (other shapes, types,
keys, values). What was cut off may only be read as complete if it reads exactly as before.
"""

import io
import json
import pickle
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.megatron_dist import write_megatron
from nemo_minitron.checkpoints.nemo1 import pack_nemo, write_folder
from nemo_minitron.checkpoints.nemo2 import write_nemo2
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.errors import MinitronError
from tests import tiny
from tests.support.checkpoints import UNIFORM, RandomSource
from tests.support.gguf_files import make_gguf
from tests.support.layouts import FOUR_LAYERS, pack, write_config, write_ranks, write_zarr

INPUTS_EACH = 110
FEWER = {"gguf": 60}
"""Where an input costs much."""
AT_LEAST = 2000
VALUES: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    3,
    2**40,
    1e300,
    float("inf"),
    True,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
    "9" * 50,
)

Mutate = Callable[[bytes, random.Random], bytes]
outcomes: Counter[str] = Counter()


def _replace_somewhere(data: Any, rng: random.Random) -> Any:
    """Plain data with one value of it replaced, removed or doubled, at any depth."""
    if isinstance(data, dict) and data:
        key = rng.choice(list(data))
        if rng.random() < 0.15:
            return {name: value for name, value in data.items() if name != key}
        return {**data, key: _replace_somewhere(data[key], rng)}
    if isinstance(data, list) and data and rng.random() < 0.8:
        index = rng.randrange(len(data))
        if rng.random() < 0.1:
            return data + data[index : index + 1]
        return [*data[:index], _replace_somewhere(data[index], rng), *data[index + 1 :]]
    return rng.choice(VALUES)


def _json(whole: bytes, rng: random.Random) -> bytes:
    return json.dumps(_replace_somewhere(json.loads(whole), rng)).encode()


def _yaml(whole: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(_replace_somewhere(yaml.safe_load(whole), rng)).encode()


def _safetensors(whole: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", whole[:8])[0]
    header = _json(whole[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


def _other_tensor(tensor: torch.Tensor, rng: random.Random) -> Any:
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: tensor.to(rng.choice([torch.int8, torch.float64, torch.float16, torch.complex64, torch.bool])),
        lambda: tensor.reshape(-1),
        lambda: tensor[:1],
        lambda: tensor[None],
        lambda: torch.zeros(0),
        lambda: torch.tensor(1.0),
        tensor.to_sparse,
        lambda: None,
        lambda: [tensor],
        lambda: tensor.expand(2, *tensor.shape),
        lambda: torch.empty(tensor.shape, device="meta"),
    )
    return rng.choice(kinds)()


def _state(whole: bytes, rng: random.Random) -> bytes:
    state = torch.load(io.BytesIO(whole), weights_only=False)
    name = rng.choice(list(state))
    if rng.random() < 0.2:
        state[rng.choice([name + ".x", 7, "", None])] = state.pop(name)
    elif torch.is_tensor(state[name]):
        state[name] = _other_tensor(state[name], rng)
    stream = io.BytesIO()
    torch.save(rng.choice([state] * 8 + [list(state), {"state_dict": [state]}]), stream)
    return stream.getvalue()


def _index(whole: bytes, rng: random.Random) -> bytes:
    index = pickle.loads(whole)
    key = rng.choice([key for key, entry in index.state_dict_metadata.items() if hasattr(entry, "chunks")])
    entry = index.state_dict_metadata[key]
    place = index.storage_data[rng.choice([found for found in index.storage_data if found.fqn == key])]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: setattr(entry, "size", torch.Size([7] * rng.randrange(4))),
        lambda: setattr(entry.properties, "dtype", rng.choice([torch.int8, torch.float64, None, "x"])),
        entry.chunks.pop,
        lambda: entry.chunks.append(entry.chunks[0]),
        lambda: setattr(entry.chunks[0], "sizes", torch.Size([rng.randrange(9)] * len(entry.size))),
        lambda: setattr(entry.chunks[0], "offsets", rng.choice(VALUES)),
        lambda: setattr(place, "offset", rng.choice([0, 1, 64, 10**12, -1, None])),
        lambda: setattr(place, "length", rng.choice([0, 1, 64, 10**12, -1, None])),
        lambda: setattr(place, "relative_path", rng.choice(["", "..", "/etc/passwd", "metadata.json", None, 3])),
        lambda: index.state_dict_metadata.pop(key),
        lambda: index.state_dict_metadata.update({key + "2": entry}),
        index.storage_data.clear,
        lambda: setattr(index, "state_dict_metadata", rng.choice(VALUES)),
    )
    rng.choice(changes)()
    return pickle.dumps(index)


def _common(whole: bytes, rng: random.Random) -> bytes:
    common = torch.load(io.BytesIO(whole), weights_only=False)
    args = vars(common["args"])
    args[rng.choice(sorted(args))] = rng.choice([*VALUES, torch.zeros(3), set(), Path("x"), torch.float16])
    stream = io.BytesIO()
    torch.save(rng.choice([common] * 8 + [[common], {"args": None}, {}]), stream)
    return stream.getvalue()


def _words(whole: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"2", b"release", b"../x", b"-1", b"1" * 60, b"\xff", b"iter_0000001", b" 1\n", b"1.0"])


# What is opened, the file in it to damage, how many of its first bytes (headers are where readers can be misled), and
# how to make it say something else.
TARGETS: dict[str, tuple[str, str, int | None, Mutate | None]] = {
    "hf weights": ("hf", "hf/model.safetensors", 4000, _safetensors),
    "hf config": ("hf", "hf/config.json", None, _json),
    "tokenizer": ("hf", "hf/tokenizer.json", 2000, _json),
    "hf bin": ("bin", "bin/pytorch_model.bin", 8000, _state),
    "hf bin, records": ("bin", "bin/pytorch_model.bin", None, _state),
    "hf shards": ("shards", "shards/model.safetensors.index.json", None, _json),
    "torch_dist index": ("folder", "folder/model_weights/.metadata", None, _index),
    "torch_dist data": ("folder", "folder/model_weights/__0_0.distcp", None, None),
    "torch_dist marker": ("folder", "folder/model_weights/metadata.json", None, _json),
    "nemo config": ("folder", "folder/model_config.yaml", None, _yaml),
    "nemo config of others": ("foreign", "foreign/model_config.yaml", None, _yaml),
    "nemo archive": ("x.nemo", "x.nemo", None, None),
    "one ckpt a rank": ("ranks", "ranks/tp_rank_01_pp_rank_001/model_weights.ckpt", 8000, _state),
    "old nemo archive": ("old.nemo", "old.nemo", 9000, None),
    "zarr header": (
        "zarr",
        "zarr/model_weights/model.decoder.layers.mlp.linear_fc2.weight/.zarray",
        None,
        _json,
    ),
    "nemo2 model": ("nemo2", "nemo2/context/model.yaml", None, _yaml),
    "nemo2 io": ("nemo2_io", "nemo2_io/context/io.json", None, _json),
    "nemo2 ours": ("nemo2", "nemo2/context/minitron.json", None, _json),
    "bridge": ("bridge", "bridge/iter_0000001/run_config.yaml", None, _yaml),
    "megatron arguments": ("lm", "lm/iter_0000001/common.pt", None, _common),
    "megatron iteration": ("lm", "lm/latest_checkpointed_iteration.txt", None, _words),
    "gguf": ("x.gguf", "x.gguf", 9000, None),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    source, four = RandomSource(UNIFORM), RandomSource(FOUR_LAYERS)
    write_hf(source, root / "hf")
    write_hf(source, root / "shards", shard_bytes=20_000)
    shutil.copytree(root / "hf", root / "bin")
    _to_bin(root / "bin")
    write_folder(source, root / "folder")
    pack_nemo(root / "folder", root / "x.nemo")
    shutil.copytree(root / "folder", root / "foreign")
    write_config(root / "foreign", UNIFORM)
    write_ranks(root / "ranks", four, "tp and pp")
    write_config(root / "ranks", FOUR_LAYERS)
    pack(root / "ranks", root / "old.nemo")
    write_zarr(root / "zarr" / "model_weights", source)
    write_config(root / "zarr", UNIFORM)
    for name in ("nemo2", "nemo2_io"):
        write_nemo2(source, root / name)
    for name in ("bridge", "lm"):
        write_megatron(source, root / name)
    for path in ("nemo2_io/context/model.yaml", "nemo2_io/context/minitron.json", "bridge/iter_0000001/minitron.json"):
        (root / path).unlink()
    for path in ("lm/iter_0000001/minitron.json", "lm/iter_0000001/run_config.yaml"):
        (root / path).unlink()
    tiny.write_llama(root / "for_gguf", num_hidden_layers=1)
    make_gguf(root / "for_gguf", root / "x.gguf")
    return root


def _to_bin(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("target", TARGETS)
def test_a_whole_model_or_a_refusal(root: Path, target: str) -> None:
    checkpoint, name, limit, mutate = TARGETS[target]
    file = root / name
    whole = file.read_bytes()
    expected = _tensors(open_checkpoint(root / checkpoint))
    rng = random.Random(target)
    found: Counter[str] = Counter()
    try:
        for number in range(FEWER.get(target, INPUTS_EACH)):
            structured = mutate is not None and number % 3 == 0
            data, cut = (mutate(whole, rng), False) if structured else _damaged(whole, limit, rng)
            file.write_bytes(data)
            outcome, tensors = _read(root / checkpoint)
            found[outcome] += 1
            if cut and outcome == "complete":
                assert expected.keys() == tensors.keys()
                assert all(torch.equal(tensors[key], expected[key]) for key in expected), (
                    "a part was taken for the complete"
                )
    finally:
        file.write_bytes(whole)
    assert found["refused"] > 0
    assert set(found) <= {"refused", "complete"}
    assert _read(root / checkpoint)[0] == "complete"
    outcomes.update(found)
    outcomes["targets"] += 1


def test_count(capsys: pytest.CaptureFixture[str]) -> None:
    """Last in the file, so that it sees all of them."""
    if outcomes["targets"] < len(TARGETS):
        pytest.skip("only some targets were selected")
    total = outcomes["refused"] + outcomes["complete"]
    with capsys.disabled():
        print(f"\n  {total} damaged inputs to {len(TARGETS)} readers: {outcomes['refused']} refused, the rest complete")
    assert total >= AT_LEAST


def _read(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    try:
        return "complete", _tensors(open_checkpoint(path))
    except MinitronError as error:
        return ("refused" if str(error).strip() else "refused without a word"), {}


def _tensors(source: TensorSource) -> dict[str, torch.Tensor]:
    from nemo_minitron.arch.weights import weights

    found = {}
    for weight in weights(source.spec):
        tensor = source.get(weight.name)
        assert (tuple(tensor.shape), tensor.dtype) == (weight.shape, source.dtype)
        assert tensor.device == torch.device("cpu")
        found[weight.name] = tensor
    return found


def _damaged(whole: bytes, limit: int | None, rng: random.Random) -> tuple[bytes, bool]:
    """Bytes with some of them changed, or cut off at some place; and whether they were only cut."""
    if rng.random() < 0.25:
        return whole[: rng.randrange(len(whole))], True
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 3, 10])):
        place = rng.randrange(min(len(data), limit or len(data)))
        data[place] = rng.choice([rng.randrange(256), data[place] ^ (1 << rng.randrange(8)), 0, 255])
    return bytes(data), False
