"""`convert` and `inspect` from the command line."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from nemo_minitron.checkpoints import nemo1
from nemo_minitron.checkpoints.convert import Format
from nemo_minitron.checkpoints.hf import HfSource, write_hf
from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.cli.main import app
from nemo_minitron.pruning.apply import PrunedSource
from tests import tiny
from tests.unit.test_checkpoints_nemo1 import equal
from tests.unit.test_families import plan_for


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convert")
    tiny.write_family(root / "hf", "llama")
    (root / "hf" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    source = HfSource(root / "hf")
    write_hf(PrunedSource(source, plan_for(source)), root / "pruned")
    return root


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["a.nemo", "folder --to nemo", "hf2 --to hf", "two --to nemo2", "m --to megatron"])
def test_a_model_goes_into_each_format_and_back(root: Path, tmp_path: Path, name: str) -> None:
    target, *options = name.split()
    assert invoke("convert", root / "hf", tmp_path / target, *options)[0] == 0
    assert equal(open_checkpoint(tmp_path / target), HfSource(root / "hf"))
    assert invoke("convert", tmp_path / target, tmp_path / "back")[0] == 0
    for file in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (root / "hf" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target, "back"])


def test_nemo_restores_what_was_converted(root: Path, tmp_path: Path) -> None:
    """`ModelPT.restore_from` of the installed NeMo, with our class and its connector."""
    from nemo.core import ModelPT

    from nemo_minitron import MegatronGPTModel
    from nemo_minitron.megatron import runtime

    assert invoke("convert", root / "pruned", tmp_path / "x.nemo")[0] == 0
    source = HfSource(root / "pruned")
    try:
        assert MegatronGPTModel.__mro__.index(ModelPT) > 0
        model = MegatronGPTModel.restore_from(tmp_path / "x.nemo")
        (chunk,) = model.chunks
        held = {weight.name: parameter for weight, parameter in chunk.named_weights()}
        assert set(held) == set(source.names())
        for name, parameter in held.items():
            assert parameter.float().equal(source.get(name).to(parameter.dtype).float()), name
    finally:
        runtime.stop()


def test_types_are_converted(root: Path, tmp_path: Path) -> None:
    assert invoke("convert", root / "hf", tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    source, half = HfSource(root / "hf"), HfSource(tmp_path / "half")
    name = "decoder.final_layernorm.weight"
    assert half.get(name).equal(source.get(name).bfloat16())
    status, said = invoke("convert", root / "hf", tmp_path / "x", "--dtype", "int4")
    assert (status, "fp32, bf16 or fp16" in said) == (2, True)
    status, said = invoke("convert", root / "hf", tmp_path / "x", "--to", "onnx")
    assert (status, f"one of {', '.join(Format)}" in said) == (2, True)


def test_what_is_there_stays_unless_forced(root: Path, tmp_path: Path) -> None:
    assert invoke("convert", root / "pruned", tmp_path / "x")[0] == 0
    before = HfSource(tmp_path / "x")
    status, said = invoke("convert", root / "hf", tmp_path / "x")
    assert (status, "--force" in said) == (2, True)
    assert equal(HfSource(tmp_path / "x"), before)
    assert invoke("convert", root / "hf", tmp_path / "x", "--force")[0] == 0
    assert equal(HfSource(tmp_path / "x"), HfSource(root / "hf"))


def test_force_does_not_delete_what_is_no_checkpoint(root: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    for target in (tmp_path / "home", tmp_path / "home" / "letters.txt"):
        status, said = invoke("convert", root / "hf", target, "--force")
        assert (status, "no checkpoint" in said) == (2, True)
    for target in (root / "hf", root / "hf" / "inside", root):
        status, said = invoke("convert", root / "hf", target, "--force")
        assert (status, "is the source" in said) == (2, True)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"


def test_an_interrupted_conversion_leaves_the_old_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in (tmp_path / "x.nemo", tmp_path / "folder"):
        assert invoke("convert", root / "pruned", target, "--to", "nemo")[0] == 0
        before = open_checkpoint(target)

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(nemo1, "write_folder_files", stop)
            assert invoke("convert", root / "hf", target, "--to", "nemo", "--force")[0] != 0
        assert equal(open_checkpoint(target), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.nemo"]


def test_inspect_says_what_it_is(root: Path) -> None:
    status, said = invoke("inspect", root / "pruned")
    assert status == 0
    for words in ("Hugging Face", "llama", "hidden size", "48", "BPE", "licence", "mit", "pruned", "carried"):
        assert words in said, words
    status, said = invoke("inspect", root / "pruned", "--json", "--weights")
    data = json.loads(said)
    spec = HfSource(root / "pruned").spec
    assert data["architecture"] == spec.to_dict()
    assert data["lineage"]["pruned"][0]["from"] == HfSource(root / "hf").spec.digest()
    assert [len(digest) for digest in data["digests"].values()] == [64, 64, 64]
    assert data["tokenizer"] == {"kind": "BPE", "size": len(AutoTokenizer.from_pretrained(root / "pruned"))}
    # Counted independently: every element of the file.
    assert data["parameters"] == sum(t.numel() for t in load_file(root / "pruned" / "model.safetensors").values())


def test_inspect_and_convert_tell_what_is_wrong(root: Path, tmp_path: Path) -> None:
    for command in (["inspect", tmp_path], ["inspect", tmp_path / "nowhere"], ["convert", tmp_path, tmp_path / "x"]):
        status, said = invoke(*command)
        assert status == 2
        assert said.startswith("error: ")
        assert "Traceback" not in said
