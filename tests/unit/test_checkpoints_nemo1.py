"""Checkpoint folders and `.nemo` files: torch and Megatron-Core read ours, we read theirs; bytes are reproducible."""

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints import read_ahead
from nemo_minitron.checkpoints.files import FolderFiles
from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.nemo1 import open_nemo, pack_nemo, write_folder, write_nemo
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.errors import CheckpointError, SpecError
from tests import tiny
from tests.support.checkpoints import UNEVEN, UNIFORM, RandomSource, _foreign, _foreign_state, equal


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nemo1")
    tiny.write_llama(root / "hf", tied=False)
    return root / "hf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(RandomSource(UNIFORM), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("spec", [UNIFORM, UNEVEN], ids=["uniform", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_through_folder_and_archive(tmp_path: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
    source = RandomSource(spec, dtype)
    write_folder(source, tmp_path / "model")
    pack_nemo(tmp_path / "model", tmp_path / "model.nemo")
    for path in (tmp_path / "model", tmp_path / "model.nemo"):
        read = open_checkpoint(path)
        assert (read.spec, read.dtype, read.lineage) == (spec, dtype, source.lineage)
        assert read.tokenizer_files() == source.tokenizer_files()
        assert equal(read, source)


def test_hugging_face_to_nemo_and_back_is_byte_identical(hf: Path, tmp_path: Path) -> None:
    write_folder(open_checkpoint(hf), tmp_path / "model")
    pack_nemo(tmp_path / "model", tmp_path / "model.nemo")
    write_hf(open_checkpoint(tmp_path / "model.nemo"), tmp_path / "back")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_folder(RandomSource(UNIFORM), tmp_path / name / "model")
        pack_nemo(tmp_path / name / "model", tmp_path / name / "model.nemo")
    one, two = ({n: _hash(tmp_path / x / n) for n in FolderFiles(tmp_path / x).names()} for x in ("one", "two"))
    assert one == two
    assert len(one) == 8  # config, two artifacts, four weight files, the archive


@pytest.mark.parametrize("spec", [UNIFORM, UNEVEN], ids=["stacked", "a key a layer"])
def test_two_large_tensors_at_most_are_alive_while_writing(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "MOST_BYTES", 0)
    source = RandomSource(spec)
    write_folder(source, tmp_path / "model")
    assert source.most_alive <= 2
    assert source.alive == 0


def test_torch_reads_what_we_write(folder: Path) -> None:
    state = {
        "model.decoder.layers.mlp.linear_fc1.weight": torch.zeros(3, 40, 24),
        "model.decoder.final_layernorm.weight": torch.zeros(24),
        "model.output_layer.weight": torch.zeros(40, 24),
    }
    dcp.load(state, checkpoint_id=folder / "model_weights", no_dist=True)
    source = RandomSource(UNIFORM)
    layers = [source.get(f"decoder.layers.{i}.mlp.linear_fc1.weight") for i in range(3)]
    assert torch.equal(state["model.decoder.layers.mlp.linear_fc1.weight"], torch.stack(layers))
    assert torch.equal(state["model.output_layer.weight"], source.get("output_layer.weight"))


@pytest.mark.parametrize("prefix", ["model.", "module.", ""])
def test_a_folder_by_independent_code_is_read(tmp_path: Path, prefix: str) -> None:
    source = RandomSource(UNIFORM)
    read = open_nemo(_foreign(tmp_path / "foreign", _foreign_state(source, prefix)))
    assert read.spec == UNIFORM
    assert equal(read, source)
    assert read.tokenizer_files() == {"tokenizer.model": b"pieces"}


def test_an_archive_by_independent_code_is_read(tmp_path: Path) -> None:
    source = RandomSource(UNIFORM)
    _foreign(tmp_path / "foreign", _foreign_state(source))
    with tarfile.open(tmp_path / "x.nemo", "w:") as archive:
        archive.add(tmp_path / "foreign", arcname=".")
    assert equal(open_nemo(tmp_path / "x.nemo"), source)


def test_tensors_split_over_ranks_are_put_together(tmp_path: Path) -> None:
    """Pieces as Megatron writes fc1 at TP 2: each rank a half of the gate and a half of the up rows."""
    from nemo_minitron.checkpoints.torch_dist import TorchDistReader, TorchDistWriter

    whole = torch.randn(2, 8, 3)
    with TorchDistWriter(tmp_path) as writer:
        for layer in range(2):
            for start in (0, 4, 2, 6):
                piece = whole[layer : layer + 1, start : start + 2]
                writer.add("x", piece, offsets=(layer, start, 0), shape=(2, 8, 3))
    reader = TorchDistReader(FolderFiles(tmp_path))
    assert torch.equal(reader.read("x"), whole)
    assert torch.equal(reader.read("x", start=(1, 1, 0), stop=(2, 7, 2)), whole[1:, 1:7, :2])


@pytest.mark.parametrize("rows", [[(0, 4)], [(0, 4), (4, 8), (0, 2)], [(0, 4), (2, 6)], [(0, 4), (6, 10)]])
def test_pieces_that_do_not_make_up_a_tensor_are_refused(tmp_path: Path, rows: list[tuple[int, int]]) -> None:
    from nemo_minitron.checkpoints.torch_dist import TorchDistReader, TorchDistWriter

    with TorchDistWriter(tmp_path) as writer:
        for start, stop in rows:
            writer.add("x", torch.zeros(stop - start, 3), offsets=(start, 0), shape=(8, 3))
    with pytest.raises(CheckpointError, match=r"pieces do not add up|a piece at|overlap or leave holes"):
        TorchDistReader(FolderFiles(tmp_path)).read("x", stop=(7, 3))


def test_rows_that_pad_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    state = _foreign_state(RandomSource(UNIFORM))
    for name in ("model.embedding.word_embeddings.weight", "model.output_layer.weight"):
        state[name] = torch.cat([state[name], torch.full((24, 24), torch.nan)])
    minitron = {"spec": UNIFORM.to_dict()}
    assert equal(open_nemo(_foreign(tmp_path / "padded", state, minitron=minitron)), RandomSource(UNIFORM))


@pytest.mark.parametrize("kind", ["uniform", "uneven"])
def test_megatron_loads_strictly_what_we_write_and_we_read_what_it_saves(hf: Path, tmp_path: Path, kind: str) -> None:
    source = open_checkpoint(hf)
    write_folder(source, tmp_path / "ours")
    if kind == "uneven":  # the same weights under a key a layer, as for layers of different sizes
        _rewrite_with_a_key_a_layer(source, tmp_path / "ours")
    job = [sys.executable, "-m", "tests.unit.megatron_folder_job"]
    paths = [tmp_path / "ours", tmp_path / "theirs" / "model_weights", tmp_path / "state.pt"]
    paths[1].mkdir(parents=True)
    done = subprocess.run([*job, *map(str, paths), kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    state = torch.load(paths[2])
    locals_ = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    for name in source.names():
        tail = name.split(".", 3)[-1]
        assert torch.equal(state[name.replace(tail, locals_.get(tail, tail))], source.get(name)), name
    shutil.copy(tmp_path / "ours" / "model_config.yaml", tmp_path / "theirs")
    for file in (tmp_path / "ours").glob("*.json*"):
        shutil.copy(file, tmp_path / "theirs")
    assert equal(open_nemo(tmp_path / "theirs"), source)


def _rewrite_with_a_key_a_layer(source: TensorSource, folder: Path) -> None:
    from nemo_minitron.checkpoints.megatron_writer import extra_state_keys
    from nemo_minitron.checkpoints.torch_dist import TorchDistWriter

    first, *others = source.spec.layers
    uneven = replace(source.spec, layers=(first.with_sizes(ffn_hidden_size=1), *others))
    shutil.rmtree(folder / "model_weights")
    (folder / "model_weights").mkdir()
    with TorchDistWriter(folder / "model_weights") as writer:
        for name in source.names():
            writer.add(f"model.{name}", source.get(name))
        for key in extra_state_keys(uneven, prefix="model."):
            writer.add_object(key, io.BytesIO())


def test_old_nemo_and_ours_describe_the_model_alike(folder: Path) -> None:
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    assert config["target"].endswith("megatron_gpt_model.MegatronGPTModel")
    assert config["kv_channels"] == 8
    assert all(value.startswith("nemo:") for value in config["minitron"]["tokenizer_files"].values())
    del config["minitron"]
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    read = open_nemo(folder)
    assert read.spec == UNIFORM
    assert set(read.tokenizer_files()) == {"tokenizer.json", "generation_config.json"}


def test_plain_tar_gives_the_folder_back(folder: Path, tmp_path: Path) -> None:
    pack_nemo(folder, tmp_path / "x.nemo")
    with tarfile.open(tmp_path / "x.nemo") as archive:
        archive.extractall(tmp_path / "all")  # without `filter`, which Python 3.11.2 does not have
    assert {n: _hash(tmp_path / "all" / n) for n in FolderFiles(tmp_path / "all").names()} == {
        n: _hash(folder / n) for n in FolderFiles(folder).names()
    }


# -- bad input -------------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "model_config.yaml").unlink(), "not a checkpoint folder"),
    "config no yaml": (lambda f: (f / "model_config.yaml").write_text("a: [1"), "not YAML"),
    "config a list": (lambda f: (f / "model_config.yaml").write_text("- 1"), "not a mapping"),
    "config of another size": (lambda f: _edit(f / "model_config.yaml", hidden_size=32), "hidden_size = 32"),
    "no weights": (lambda f: shutil.rmtree(f / "model_weights"), "metadata.json is missing"),
    "not finished": (lambda f: (f / "model_weights" / "metadata.json").unlink(), "not complete"),
    "zarr": (lambda f: (f / "model_weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "zarr"),
    "no index": (lambda f: (f / "model_weights" / ".metadata").unlink(), ".metadata is missing"),
    "index cut": (lambda f: _truncate(f / "model_weights" / ".metadata"), "damaged"),
    "data cut": (lambda f: _truncate(f / "model_weights" / "__0_0.distcp"), "truncated"),
    "data gone": (lambda f: (f / "model_weights" / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "artifact gone": (lambda f: next(f.glob("*_tokenizer.json")).unlink(), "_tokenizer.json is missing"),
    "one pickle a rank": (lambda f: (f / "model_weights.ckpt").write_bytes(b""), "model_weights.ckpt"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_with_its_reason(folder: Path, damage: str) -> None:
    act, reason = DAMAGE[damage]
    act(folder)
    with pytest.raises((CheckpointError, SpecError)) as caught:
        open_checkpoint(folder)
    assert reason in str(caught.value)


def test_missing_extra_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    good = _foreign_state(RandomSource(UNIFORM))
    name = "model.decoder.layers.mlp.linear_fc2.weight"
    cases = {
        name: {key: value for key, value in good.items() if key != name},
        "model.decoder.layers.mlp.gate.weight": {**good, "model.decoder.layers.mlp.gate.weight": torch.zeros(3, 2)},
        "shaped (3, 24, 21)": {**good, name: torch.zeros(3, 24, 21)},
    }
    for number, (words, state) in enumerate(cases.items()):
        with pytest.raises(CheckpointError) as caught:
            open_nemo(_foreign(tmp_path / str(number), state))
        assert words in str(caught.value)


class Exploit:
    """Unpickling it with an ordinary unpickler runs a shell command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_code_in_the_index_is_not_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (folder / "model_weights" / ".metadata").write_bytes(pickle.dumps(Exploit(proof)))
    with pytest.raises(CheckpointError, match=r"refused, its pickle asks for posix\.system"):
        open_checkpoint(folder)
    assert not proof.exists()
    pickle.loads((folder / "model_weights" / ".metadata").read_bytes())
    assert proof.exists()  # the exploit is a live one


def test_code_in_a_tensor_is_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    state = _foreign_state(RandomSource(UNIFORM))
    path = _foreign(tmp_path / "foreign", state)
    data = path / "model_weights" / "__0_0.distcp"
    index = pickle.loads((path / "model_weights" / ".metadata").read_bytes())
    place = next(p for i, p in index.storage_data.items() if i.fqn == "model.output_layer.weight")
    record = io.BytesIO()
    torch.save(Exploit(proof), record)
    content = bytearray(data.read_bytes())
    # A zip archive may have anything in front of it.
    content[place.offset : place.offset + place.length] = record.getvalue().rjust(place.length, b"\0")
    data.write_bytes(content)
    source = open_nemo(path)
    with pytest.raises(CheckpointError, match="refused"):
        source.get("output_layer.weight")
    assert not proof.exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "above", "absolute", "device"])
def test_archives_that_reach_outside_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    pack_nemo(folder, tmp_path / "x.nemo")
    member = tarfile.TarInfo({"above": "../evil", "absolute": "/tmp/evil"}.get(kind, "./evil"))
    kinds = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    member.type, member.linkname = kinds.get(kind, tarfile.REGTYPE), "/etc/passwd"
    with tarfile.open(tmp_path / "x.nemo", "a:") as archive:
        archive.addfile(member)
    with pytest.raises(CheckpointError, match="refused because of its member"):
        open_checkpoint(tmp_path / "x.nemo")


@pytest.mark.parametrize("keep", [0, 300, 0.3, 0.9])
def test_a_truncated_archive_is_refused(folder: Path, tmp_path: Path, keep: float) -> None:
    pack_nemo(folder, tmp_path / "x.nemo")
    data = (tmp_path / "x.nemo").read_bytes()
    (tmp_path / "x.nemo").write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"x\.nemo"):
        open_checkpoint(tmp_path / "x.nemo")


def test_a_failed_pack_leaves_the_previous_file_whole(folder: Path, tmp_path: Path) -> None:
    pack_nemo(folder, tmp_path / "x.nemo")
    before = _hash(tmp_path / "x.nemo")
    _truncate(folder / "model_weights" / "__0_0.distcp")
    with pytest.raises(CheckpointError):
        pack_nemo(folder, tmp_path / "x.nemo")
    assert _hash(tmp_path / "x.nemo") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x.nemo"]


def test_a_failed_write_leaves_the_previous_folder_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: _hash(folder / n) for n in FolderFiles(folder).names()}
    source = RandomSource(UNEVEN)
    monkeypatch.setattr(source, "tokenizer_files", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_folder(source, folder)
    assert {n: _hash(folder / n) for n in FolderFiles(folder).names()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_a_killed_write_has_left_goes_with_the_next(hf: Path, tmp_path: Path) -> None:
    """An archive is packed from a folder as large as it is."""
    code = (
        "import os, sys; from pathlib import Path; from nemo_minitron.checkpoints import nemo1;"
        "from nemo_minitron.checkpoints.open import open_checkpoint;"
        "nemo1.pack_nemo = lambda *_, **__: os._exit(9);"
        f"nemo1.write_nemo(open_checkpoint(Path({str(hf)!r})), Path({str(tmp_path / 'model.nemo')!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert [path for path in tmp_path.iterdir() if path.is_dir()], "a copy of the model"
    write_nemo(open_checkpoint(hf), tmp_path / "model.nemo")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert equal(open_checkpoint(tmp_path / "model.nemo"), open_checkpoint(hf))
