"""The tokenizer of a checkpoint: read to the letter, and recognised again."""

import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from nemo_minitron.data.tokenizer import encode_documents, end_of_document, load_tokenizer, tokenizer_digest
from nemo_minitron.errors import DataError
from tests.tiny import sentences, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture
def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


TEXTS = [sentences(seed, 5) for seed in range(3)] + ["x"]


def test_ids_are_those_of_transformers_with_one_end_behind_each(folder, files):
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(files)
    found = [tokens.tolist() for tokens in encode_documents(TEXTS, tokenizer, 256)]
    assert found == [[*reference(text).input_ids, reference.eos_token_id] for text in TEXTS]


def test_a_tokenizer_that_adds_its_own_end_does_not_get_a_second_one(files):
    tokenizer = load_tokenizer(files)
    plain = next(encode_documents(TEXTS[:1], tokenizer, 256)).tolist()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    assert next(encode_documents(TEXTS[:1], tokenizer, 256)).tolist() == [tokenizer.eos_token_id, *plain]


def test_a_length_limit_left_in_the_file_does_not_cut_documents(files):
    whole = [tokens.tolist() for tokens in encode_documents(TEXTS, load_tokenizer(files), 256)]
    data = json.loads(files["tokenizer.json"])
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "<|end|>"}  # fmt: skip
    files["tokenizer.json"] = json.dumps(data).encode()
    limited = load_tokenizer(files)
    assert [tokens.tolist() for tokens in encode_documents(TEXTS, limited, 256)] == whole
    assert tokenizer_digest(limited) == tokenizer_digest(load_tokenizer(files | {"tokenizer.json": json.dumps(
        data | {"truncation": None, "padding": None}).encode()}))  # fmt: skip


def test_the_digest_survives_saving_and_sees_real_changes(files, tmp_path):
    tokenizer = load_tokenizer(files)
    digest = tokenizer_digest(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert tokenizer_digest(load_tokenizer(again)) == digest

    data = json.loads(files["tokenizer.json"])
    reindented = files | {"tokenizer.json": json.dumps(data, indent=7, sort_keys=True).encode()}
    assert tokenizer_digest(load_tokenizer(reindented)) == digest

    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, data["pre_tokenizer"] | {"add_prefix_space": True}]}  # fmt: skip
    other = files | {"tokenizer.json": json.dumps(data).encode()}
    assert tokenizer_digest(load_tokenizer(other)) != digest, "same vocabulary, other cuts"


def test_a_token_outside_the_vocabulary_is_refused(files):
    tokenizer = load_tokenizer(files)
    largest = max(max(tokens) for tokens in encode_documents(TEXTS, tokenizer, 256))
    list(encode_documents(TEXTS, tokenizer, int(largest) + 1))
    with pytest.raises(DataError, match=f"token {largest} .*\n.*vocabulary of {largest}"):
        list(encode_documents(TEXTS, tokenizer, int(largest)))
    tokenizer.add_tokens(["<|late|>"])
    tokenizer.eos_token = "<|late|>"
    with pytest.raises(DataError, match="end-of-sequence"):
        end_of_document(tokenizer, len(tokenizer) - 1)


def test_bad_files_get_one_clear_message(files):
    with pytest.raises(DataError, match=r"no tokenizer\.json among vocab\.txt"):
        load_tokenizer({"vocab.txt": b""})
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(files | {"tokenizer.json": files["tokenizer.json"][:-40]})
    config = json.loads(files["tokenizer_config.json"]) | {"eos_token": None}
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_tokenizer(
            {"tokenizer.json": files["tokenizer.json"], "tokenizer_config.json": json.dumps(config).encode()}
        )
