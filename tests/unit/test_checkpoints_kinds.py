"""Two candidates for one thing, references, and what is left behind: read right or refused by name, in every reader."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from nemo_minitron.checkpoints.convert import convert
from nemo_minitron.checkpoints.files import FolderFiles
from nemo_minitron.checkpoints.hf import open_hf
from nemo_minitron.checkpoints.nemo1 import open_nemo, write_folder
from nemo_minitron.checkpoints.open import hub_remedy, open_checkpoint
from nemo_minitron.checkpoints.summary import lines, summary
from nemo_minitron.data.tokenizer import encode_documents, load_tokenizer
from nemo_minitron.errors import CheckpointError, DataError, MinitronError
from tests import tiny

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    tiny.write_llama(root / "tied", tied=True, num_hidden_layers=2)
    tiny.write_llama(root / "untied", tied=False, num_hidden_layers=2, seed=1)
    return root


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "tied", tmp_path / "model"))


@pytest.fixture
def untied(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "untied", tmp_path / "untied"))


def edit(folder: Path, file: str = "config.json", **change: object) -> None:
    path = folder / file
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (data | change).items() if value is not ...}))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


# -- weights ---------------------------------------------------------------------------------------------------------


def in_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def test_a_single_file_beside_the_index_of_others_is_refused(folder: Path) -> None:
    tensors = in_shards(folder)
    open_hf(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = refusal(folder)
    assert "model.safetensors and model.safetensors.index.json" in said
    assert "remedy: remove the one that is old" in said
    whole = dict.fromkeys(tensors, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": whole}))
    open_hf(folder)  # an index of that very file


def test_safetensors_go_before_files_of_torch_as_in_transformers(folder: Path, untied: Path) -> None:
    state = load_file(untied / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    source = open_hf(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(source.get("embedding.word_embeddings.weight"), theirs.model.embed_tokens.weight)
    assert "not read, beside the safetensors: pytorch_model.bin" in source.notes()


def test_one_weight_in_two_shards(folder: Path) -> None:
    tensors = in_shards(folder)
    second = load_file(folder / "model-2.safetensors")
    name = sorted(tensors)[0]
    save_file(second | {name: tensors[name]}, folder / "model-2.safetensors", {"format": "pt"})
    open_hf(folder)  # the same values twice
    save_file(second | {name: tensors[name] + 1}, folder / "model-2.safetensors", {"format": "pt"})
    said = refusal(folder)
    for words in (name, "model-1.safetensors", "model-2.safetensors", "different values"):
        assert words in said


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tied_model_and_its_matrices(folder: Path, untied: Path, form: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    def save(found: dict[str, torch.Tensor]) -> None:
        if form == "bin":
            torch.save(found, folder / "pytorch_model.bin")
        else:
            save_file(found, folder / "model.safetensors", {"format": "pt"})

    shared = tensors[TABLE] if form == "bin" else tensors[TABLE].clone()
    save(tensors | {HEAD: shared})
    assert open_hf(folder).spec.tied_embeddings
    save({HEAD if name == TABLE else name: tensor for name, tensor in tensors.items()})
    source = open_hf(folder)  # the shared matrix under the name of the output layer alone
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    found = source.get("embedding.word_embeddings.weight")
    assert torch.equal(found, tensors[TABLE])
    assert torch.equal(found, theirs.model.embed_tokens.weight)
    save(tensors | {HEAD: tensors[TABLE] + 1})
    said = refusal(folder)
    for words in ("tie_word_embeddings = true", HEAD, TABLE, "rule", "remedy"):
        assert words in said


def test_an_untied_model_without_a_head_stays_refused(untied: Path) -> None:
    tensors = load_file(untied / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != HEAD}, untied / "model.safetensors", {"format": "pt"})
    said = refusal(untied)
    assert HEAD in said
    assert "tie_word_embeddings = False" in said


def test_weights_of_several_types_are_told(folder: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = open_hf(folder)
    assert source.dtype is torch.float32
    assert any("bfloat16, 1 float32" in note for note in source.notes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 128}, "hidden_size = 128"),
        ({"hidden_size": ...}, "hidden_size = 4096, a default"),
        ({"vocab_size": 512}, "vocab_size = 512"),
        ({"num_hidden_layers": 1}, "num_hidden_layers = 1"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_what_contradicts_the_bytes_is_named(folder: Path, change: dict[str, object], words: str) -> None:
    edit(folder, **change)
    assert words in refusal(folder)


def test_no_quantisation_and_a_key_twice(folder: Path) -> None:
    edit(folder, quantization_config=None)
    open_hf(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-1] + ', "rms_norm_eps": 0.1}')
    assert "'rms_norm_eps' occurs twice" in refusal(folder)


def test_weights_behind_a_linked_folder_are_found(folder: Path, tmp_path: Path) -> None:
    write_folder(open_hf(folder), tmp_path / "nemo")
    (tmp_path / "nemo" / "model_weights").rename(tmp_path / "elsewhere")
    (tmp_path / "nemo" / "model_weights").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "nemo", target_is_directory=True)  # a link back up ends
    assert open_nemo(tmp_path / "nemo").spec == open_hf(folder).spec
    names = FolderFiles(tmp_path / "nemo").names()
    assert len(names) == len(set(names))


# -- ids and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "nemo", "nemo2", "megatron"])
def test_ids_of_config_and_generation_travel_apart(folder: Path, tmp_path: Path, to: str) -> None:
    """Lists, null, and ids that the two files name differently; through every format and back."""
    edit(folder, eos_token_id=[7, 8, 9], bos_token_id=5, pad_token_id=None)
    for generation in ({"temperature": 0.6, "do_sample": True}, {"eos_token_id": [9, 10], "bos_token_id": 5}):
        (folder / "generation_config.json").write_text(json.dumps(generation))
        convert(folder, tmp_path / "there", to=to, replace=True)
        convert(tmp_path / "there", tmp_path / "back", to="hf", replace=True)
        config = AutoConfig.from_pretrained(tmp_path / "back")
        assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ([7, 8, 9], 5, None)
        found = GenerationConfig.from_pretrained(tmp_path / "back")
        assert found.eos_token_id == generation.get("eos_token_id")
        assert not (tmp_path / "back" / "minitron_ids.json").exists()


def test_no_token_stays_no_token(folder: Path, tmp_path: Path) -> None:
    """`bos_token_id: null` is not Llama's default of 1; an absent key is."""
    (folder / "generation_config.json").unlink()
    edit(folder, bos_token_id=None)
    convert(folder, tmp_path / "null", to="hf")
    assert AutoConfig.from_pretrained(tmp_path / "null").bos_token_id is None
    edit(folder, bos_token_id=...)
    convert(folder, tmp_path / "absent", to="hf")
    assert AutoConfig.from_pretrained(tmp_path / "absent").bos_token_id == 1


def test_a_phi3_with_its_pad_in_config_json_alone(tmp_path: Path) -> None:
    tiny.write_family(tmp_path / "phi3", "phi3", num_hidden_layers=1)
    edit(tmp_path / "phi3", "generation_config.json", pad_token_id=...)
    convert(tmp_path / "phi3", tmp_path / "out", to="hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.pad_token_id == 0


def test_templates_travel_and_the_rest_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "chat_template.json").write_text('{"chat_template": "x"}')
    (folder / "preprocessor_config.json").write_text("{}")
    edit(folder, auto_map={"AutoConfig": "code.Config"})
    notes = "\n".join(open_hf(folder).notes())
    assert "files that are not carried on: preprocessor_config.json" in notes
    assert "keys of config.json that are not carried on: auto_map" in notes
    convert(folder, tmp_path / "m.nemo")
    for to in ("nemo2", "megatron", "hf"):
        convert(tmp_path / "m.nemo", tmp_path / "out", to=to, replace=True)
        found = open_checkpoint(tmp_path / "out").tokenizer_files()
        assert found["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
        assert found["chat_template.json"] == b'{"chat_template": "x"}'
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_inspect_tells_ids_context_assumptions_and_the_tokenizer(folder: Path) -> None:
    edit(
        folder,
        rms_norm_eps=...,
        eos_token_id=[3, 4],
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters=...,
    )
    text = "\n".join(lines(summary(open_checkpoint(folder), folder)))
    for words in ("eos [3, 4]", "no rms_norm_eps: 1e-06", "divided by 2", "context", "256", "BPE"):
        assert words in text, words
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    text = "\n".join(lines(summary(open_checkpoint(folder), folder)))
    assert "cannot be used" in text
    assert "tokenizer.model" in text


def test_added_tokens_without_a_row_get_their_own_remedy(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 256, "content": "<extra>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert "take the added tokens without a row (<extra>)" in refusal(folder)


def test_special_tokens_without_a_row_are_told_and_refused_in_texts(folder: Path, tmp_path: Path) -> None:
    """As in Gemma 3's text models, whose tokenizer has the token of images one behind the last row."""
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]  # complete: `tokenizers` numbers an added token by the size of the vocabulary
    vocabulary |= {f"unused {number}": number for number in range(len(vocabulary), 256)}
    data["added_tokens"].append({**data["added_tokens"][0], "id": 256, "content": "<image_soft_token>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    source = open_checkpoint(folder)
    assert any("<image_soft_token> (256)" in note for note in source.notes())
    write_folder(source, tmp_path / "nemo")
    assert any("<image_soft_token> (256)" in note for note in open_checkpoint(tmp_path / "nemo").notes())
    tokenizer = load_tokenizer(source.tokenizer_files())
    text = "the <image_soft_token> of the river"
    with pytest.raises(DataError, match="gives token 256"):
        list(encode_documents([text], tokenizer, 256, parse_special_tokens=True))
    [plain] = encode_documents([text], tokenizer, 256)
    assert plain.max() < 256


# -- NeMo ------------------------------------------------------------------------------------------------------------


def nemo(folder: Path, out: Path, section: dict[str, object], artifacts: dict[str, bytes]) -> Path:
    """An unpacked `.nemo` of somebody else's: no record of ours, artifacts of any name."""
    write_folder(open_hf(folder), out)
    for path in list(out.iterdir()):
        if path.is_file() and path.name != "model_config.yaml":
            path.unlink()
    config = yaml.safe_load((out / "model_config.yaml").read_text())
    del config["minitron"]
    (out / "model_config.yaml").write_text(yaml.safe_dump(config | {"tokenizer": section}))
    for name, data in artifacts.items():
        (out / name).write_bytes(data)
    return out


def test_artifacts_of_any_name_are_followed(folder: Path, tmp_path: Path) -> None:
    section = {"library": "sentencepiece", "model": "nemo:abc_nemotron_2_256k.model", "type": None}
    out = nemo(folder, tmp_path / "a", section, {"abc_nemotron_2_256k.model": b"pieces"})
    assert open_nemo(out).tokenizer_files()["tokenizer.model"] == b"pieces"
    out = nemo(folder, tmp_path / "b", section, {})
    said = refusal(out)
    assert "tokenizer.model = 'nemo:abc_nemotron_2_256k.model', which is not there" in said
    out = nemo(folder, tmp_path / "c", {"library": "huggingface", "type": "org/name"}, {})
    assert "'org/name' (library huggingface) is named, not carried" in open_nemo(out).notes()[0]
    both = {f"{'0' * 31}{n}_tokenizer.model": f"pieces {n}".encode() for n in (1, 2)}
    assert "are both a tokenizer.model, and differ" in refusal(nemo(folder, tmp_path / "d", {}, both))


def test_a_nemo_file_of_ours_names_the_model_it_carries(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"pieces")
    write_folder(open_hf(folder), tmp_path / "nemo")
    section = yaml.safe_load((tmp_path / "nemo" / "model_config.yaml").read_text())["tokenizer"]
    assert section["library"] == "sentencepiece"
    assert (tmp_path / "nemo" / section["model"].removeprefix("nemo:")).read_bytes() == b"pieces"


def test_an_edited_configuration_beside_our_record_is_refused(folder: Path, tmp_path: Path) -> None:
    for to, file, old, new in (
        ("nemo", "model_config.yaml", "rotary_base: 10000.0", "rotary_base: 20000.0"),
        ("nemo2", "context/model.yaml", "rotary_base: 10000.0", "rotary_base: 20000.0"),
        ("megatron", "iter_0000001/run_config.yaml", "rotary_base: 10000.0", "rotary_base: 20000.0"),
    ):
        out = tmp_path / to
        convert(folder, out, to=to)
        text = (out / file).read_text()
        assert old in text
        (out / file).write_text(text.replace(old, new, 1))
        with pytest.raises(MinitronError, match="rotary_base = 20000"):
            open_checkpoint(out)


def test_a_path_that_is_missing_is_a_name_on_the_hub_only_if_it_can_be_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "hf download organisation/name" in hub_remedy("organisation/name")
    assert [hub_remedy(path) for path in ("models/student.nemo", "models/a.gguf", "runs/demo", "a/b/c")] == [""] * 4
