"""Hugging Face folders: what transformers writes is read, what we write transformers reads, byte for byte."""

import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.arch.weights import weights
from nemo_minitron.checkpoints import hf
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.errors import CheckpointError, MinitronError, SpecError
from tests import tiny
from tests.oracles import canonical_gpt
from tests.tolerances import TOL

TOKENS = torch.tensor([3, 141, 59, 26, 5, 35, 89, 79, 32, 38])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    tiny.write_llama(root / "tied", tied=True)
    tiny.write_llama(root / "untied", tied=False, num_key_value_heads=2, head_dim=12)
    tiny.write_qwen2(root / "qwen2")
    return {name: root / name for name in ("tied", "untied", "qwen2")}


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["tied"], tmp_path / "broken"))


@pytest.mark.parametrize("name", ["tied", "untied", "qwen2"])
def test_canonical_packing_gives_the_logits_of_transformers(folders: dict[str, Path], name: str) -> None:
    source = open_checkpoint(folders[name])
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64).eval()
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    # transformers takes rotary angles and RMSNorm in fp32 even for a float64 model.
    torch.testing.assert_close(canonical_gpt.logits(source.get, source.spec, TOKENS), expected, **TOL[torch.float32])


@pytest.mark.parametrize("name", ["tied", "untied", "qwen2"])
def test_writing_what_was_read_gives_the_same_weight_file(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    write_hf(open_checkpoint(folders[name]), tmp_path / "out")
    assert _hash(tmp_path / "out" / "model.safetensors") == _hash(folders[name] / "model.safetensors")


def test_names_and_shapes_are_those_of_the_table(folders: dict[str, Path]) -> None:
    source = open_hf(folders["qwen2"])
    assert source.names() == tuple(weight.name for weight in weights(source.spec))
    for weight in weights(source.spec):
        tensor = source.get(weight.name)
        assert tuple(tensor.shape) == weight.shape
        assert tensor.is_contiguous()


@pytest.mark.parametrize("name", ["tied", "untied", "qwen2"])
def test_transformers_reads_small_shards(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = open_checkpoint(folders[name])
    write_hf(source, tmp_path / "out", dtype=torch.bfloat16, shard_bytes=60_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in safetensors.torch.load_file(shard).values()) <= 60_000 for shard in shards)
    theirs = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    again = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(again.get(key), source.get(key).bfloat16()) for key in source.names())


def test_shards_of_transformers_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["untied"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    source, other = open_hf(folders["untied"]), open_hf(tmp_path / "sharded")
    assert all(torch.equal(source.get(name), other.get(name)) for name in source.names())


def test_config_tokenizer_and_generation_defaults_travel(folders: dict[str, Path], tmp_path: Path) -> None:
    write_hf(open_checkpoint(folders["untied"]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["head_dim"] == 12  # not hidden_size / num_attention_heads
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (folders["untied"], tmp_path / "out"))
    text = "the river of the city was a war in the peace. 1066!"
    assert theirs(text).input_ids == ours(text).input_ids
    assert open_hf(tmp_path / "out").lineage["base_model"] == "untied"


def test_licence_of_the_model_card_is_kept(broken: Path, tmp_path: Path) -> None:
    (broken / "README.md").write_text("---\nlanguage: en\nlicense: llama3.1\n---\n# A model\n")
    (broken / "LICENSE").write_text("terms")
    write_hf(open_checkpoint(broken), tmp_path / "out")
    assert open_hf(tmp_path / "out").lineage["license"] == "llama3.1"
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def test_a_folder_of_the_hubs_cache_is_known_by_its_hub_name(folders: dict[str, Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in folders["tied"].iterdir():
        (snapshot / file.name).symlink_to(file)
    assert open_hf(snapshot).lineage["base_model"] == "org/some-model"


def test_a_failed_write_leaves_the_previous_folder_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_hf(open_checkpoint(folders["tied"]), out)
    before = {file.name: _hash(file) for file in out.iterdir()}
    source = open_checkpoint(folders["untied"])
    real, calls = source.get, iter(range(10_000))

    def failing(name: str) -> torch.Tensor:
        if next(calls) == 7:
            raise OSError(28, "No space left on device")
        return real(name)

    with pytest.raises(OSError, match="No space"):
        write_hf(replace(source, get=failing), out)
    assert {file.name: _hash(file) for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_is_mended_by_the_next_write(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_hf(open_checkpoint(folders["tied"]), out)
    out.rename(tmp_path / ".out.old")
    with pytest.raises(RuntimeError), hf.staged_folder(out):
        raise RuntimeError
    assert open_hf(out).spec.num_layers == 4


@pytest.mark.parametrize("size", [0, 5, 200, 50_000, -4])
def test_truncated_weights_are_refused(broken: Path, size: int) -> None:
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(broken)


def test_missing_extra_and_misshapen_weights_are_named(broken: Path) -> None:
    path = broken / "model.safetensors"
    good = safetensors.torch.load_file(path)

    def refused_with(tensors: dict[str, torch.Tensor]) -> str:
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(broken)
        return str(caught.value)

    name = "model.layers.2.mlp.up_proj.weight"
    assert name in refused_with({key: value for key, value in good.items() if key != name})
    assert "model.layers.9.mlp.x" in refused_with({**good, "model.layers.9.mlp.x": torch.zeros(2)})
    assert f"{name} is shaped (95, 64)" in refused_with({**good, name: torch.zeros(95, 64)})
    assert "type I64" in refused_with({**good, name: torch.zeros(96, 64, dtype=torch.int64)})


def test_a_tied_model_stored_twice_is_read_once(broken: Path) -> None:
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, broken / "model.safetensors")
    assert "output_layer.weight" not in open_checkpoint(broken).names()


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"num_attention_heads": 7},
        {"num_hidden_layers": 0},
        {"quantization_config": {"bits": 4}},
    ],
)
def test_unsupported_configurations_are_refused(broken: Path, change: dict[str, object]) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((SpecError, CheckpointError)):
        open_checkpoint(broken)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(broken)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(broken: Path) -> None:
    data = json.loads((broken / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 256, "content": "<extra>", "special": False})
    (broken / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"largest token id is 256, but vocab_size is 256"):
        open_checkpoint(broken)


def test_index_may_not_lead_outside_the_folder(broken: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../broken/model.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not the name of a file"):
        open_checkpoint(broken)


@pytest.mark.parametrize(
    "header",
    [
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "F32", "shape": "22", "data_offsets": [0, 8]}},
        {"a": [1, 2]},
        [],
    ],
    ids=["overlap", "gap", "size", "negative", "huge", "text", "list", "no object"],
)
def test_unsound_headers_are_refused(broken: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(broken)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 600])
def test_other_files_and_folders_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.bin").write_bytes(content)
    for path in (tmp_path / "file.bin", tmp_path, tmp_path / "absent"):
        with pytest.raises(MinitronError, match=str(path)):
            open_checkpoint(path)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
