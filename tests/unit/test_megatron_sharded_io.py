"""Weights and training states on disk: what is written, that a resume is exact, and that damage is told."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import Precision
from nemo_minitron.errors import CheckpointError
from nemo_minitron.megatron import sharded_io
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.cpu import local_objects
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.megatron.sharded_io import load_weights, save_weights, stored_shapes
from tests.ranks import run_on_ranks

SPEC = ModelSpec(
    vocab_size=62,
    hidden_size=16,
    head_dim=8,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=20),) * 3,
    max_position_embeddings=64,
)


@pytest.fixture
def saved(here: Runtime, tmp_path: Path) -> Path:
    save_weights(build_chunks(SPEC, here, Precision.FP32, seed=1), tmp_path)
    return tmp_path


def test_names_and_shapes_on_disk(saved: Path) -> None:
    entries = dcp.FileSystemReader(saved / "model_weights").read_metadata().state_dict_metadata
    found = {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}
    assert found == {
        "model.embedding.word_embeddings.weight": (62, 16),
        "model.decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 16),
        "model.decoder.layers.self_attention.linear_qkv.weight": (3, 64, 16),
        "model.decoder.layers.self_attention.linear_proj.weight": (3, 16, 32),
        "model.decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 16),
        "model.decoder.layers.mlp.linear_fc1.weight": (3, 40, 16),
        "model.decoder.layers.mlp.linear_fc2.weight": (3, 16, 20),
        "model.decoder.final_layernorm.weight": (16,),
        "model.output_layer.weight": (62, 16),
    }
    assert found == stored_shapes(SPEC)
    assert not list(saved.glob(".*.partial"))


def test_megatron_loads_it_strictly(saved: Path, here: Runtime) -> None:
    from megatron.core import dist_checkpointing

    model = build_chunks(SPEC, here, Precision.FP32)[0]
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="model."), str(saved / "model_weights"))
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    assert all(not parameter.isnan().any() for parameter in model.parameters())


@pytest.mark.parametrize(("written", "read"), [(Precision.FP32, Precision.BF16), (Precision.BF16, Precision.FP32)])
def test_weights_are_converted(written: Precision, read: Precision, here: Runtime, tmp_path: Path) -> None:
    source = build_chunks(SPEC, here, written, seed=1)
    save_weights(source, tmp_path)
    target = build_chunks(SPEC, here, read)
    load_weights(target, tmp_path)
    for ours, theirs in zip(target[0].parameters(), source[0].parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_differences_are_listed_together(saved: Path, here: Runtime) -> None:
    wider = replace(SPEC, qkv_bias=True, tied_embeddings=True).with_sizes(ffn_hidden_size=24)
    with pytest.raises(CheckpointError) as caught:
        load_weights(build_chunks(wider, here, Precision.FP32), saved)
    text = str(caught.value)
    assert "model.decoder.layers.self_attention.linear_qkv.bias is missing" in text
    assert "model.output_layer.weight is not a weight of the model" in text
    assert "model.decoder.layers.mlp.linear_fc2.weight has shape [3, 16, 20], the model's is [3, 16, 24]" in text


def test_an_unfinished_folder_is_refused(saved: Path, here: Runtime) -> None:
    (saved / "model_weights" / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"metadata\.json is missing"):
        load_weights(build_chunks(SPEC, here, Precision.FP32), saved)


def test_a_truncated_file_is_told(saved: Path, here: Runtime) -> None:
    (file,) = (saved / "model_weights").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="could not be read"):
        load_weights(build_chunks(SPEC, here, Precision.FP32), saved)


@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_a_weight_too_few_or_too_many_is_told(
    fault: str, saved: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = sharded_io._read

    def faulty(*args: object) -> dict[str, object]:
        state = read(*args)
        weights = state["model"]["chunk0"]
        weight = weights["model.decoder.final_layernorm.weight"]
        if fault == "missing":
            del weights["model.decoder.final_layernorm.weight"]
        else:
            weights["model.decoder.second_layernorm.weight"] = weight
        return state

    monkeypatch.setattr(sharded_io, "_read", faulty)
    with pytest.raises(CheckpointError, match=r"1 name.*decoder\.(final|second)_layernorm\.weight"):
        load_weights(build_chunks(SPEC, here, Precision.FP32), saved)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_too_small_is_told_before_anything_is_written(
    saved: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 900, 100))
    with pytest.raises(CheckpointError, match="the disk has"):
        save_weights(build_chunks(SPEC, here, Precision.FP32, seed=2), saved)
    monkeypatch.undo()
    load_weights(build_chunks(SPEC, here, Precision.FP32), saved)


def test_a_write_that_fails_leaves_the_old_weights(saved: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    old = (saved / "model_weights" / "__0_0.distcp").read_bytes()
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_weights(build_chunks(SPEC, here, Precision.FP32, seed=2), saved)
    assert (saved / "model_weights" / "__0_0.distcp").read_bytes() == old


def test_saving_again_replaces(saved: Path, here: Runtime) -> None:
    other = build_chunks(SPEC, here, Precision.FP32, seed=2)
    save_weights(other, saved)
    again = build_chunks(SPEC, here, Precision.FP32)
    load_weights(again, saved)
    assert torch.equal(again[0].output_layer.weight, other[0].output_layer.weight)
    assert [path.name for path in saved.iterdir()] == ["model_weights"]


def test_a_folder_that_cannot_be_made_is_told(here: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_weights(build_chunks(SPEC, here, Precision.FP32, seed=2), tmp_path / "file")
    assert not sharded_io.WEIGHTS.startswith(".")


def test_saving_leaves_gloo_no_threads_of_its_own(tmp_path):
    """Each would keep an OpenMP team, and every small operation after a checkpoint would wait for a sleeping thread."""
    assert run_on_ranks(1, threads_around_large_objects) == [0]


def threads_around_large_objects() -> int:
    """How many more threads there are after large objects went through the collectives that checkpoints use."""
    large = list(range(100_000))
    gathered: list[object] = [None]

    def exchange() -> None:
        torch.distributed.all_gather_object(gathered, large)
        torch.distributed.gather_object(large, gathered)
        torch.distributed.scatter_object_list([None], [large])
        torch.distributed.broadcast_object_list([large])

    torch.set_num_threads(2)
    torch.ones(1 << 20).add_(1)
    before = len(os.listdir("/proc/self/task"))
    with local_objects():
        exchange()
    assert gathered[0] is large
    return len(os.listdir("/proc/self/task")) - before
