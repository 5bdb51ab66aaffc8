"""Token files, read back without the code that wrote them."""

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.config.run import DataConfig
from nemo_minitron.data.documents import Document
from nemo_minitron.data.splits import assign
from nemo_minitron.data.tokenizer import tokenizer_digest
from nemo_minitron.errors import DataError
from nemo_minitron.megatron import token_files
from nemo_minitron.megatron.data import read_info, write_token_files
from nemo_minitron.megatron.token_files import open_split
from tests.tiny import sentences, write_tokenizer

CONFIG = DataConfig(sources=("x",), calibration_fraction=0.2, heldout_fraction=0.2, min_characters=30)
DOCUMENTS = [Document(str(seed), sentences(seed, 1 + seed % 5)) for seed in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(params=[1000, 10], ids=["small corpus", "streamed"])
def corpus_limit(request, monkeypatch):
    monkeypatch.setattr(token_files, "_SMALL_CORPUS", request.param)
    monkeypatch.setattr(token_files, "_BATCH_DOCUMENTS", 7)


def test_files_hold_the_documents_of_each_split_in_order(tmp_path, tokenizer, corpus_limit):
    info = write_token_files([*DOCUMENTS, Document("short", "too short")], tokenizer, tmp_path, CONFIG, seed=5)
    assert read_info(tmp_path) == info
    assert info["dtype"] == "uint16"
    assert info["tokenizer_digest"] == tokenizer_digest(tokenizer)
    splits = assign(DOCUMENTS, CONFIG, 5)
    for split in ("train", "calibration", "heldout"):
        texts = [document.text for document, chosen in zip(DOCUMENTS, splits, strict=True) if chosen == split]
        expected = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
        found = np.fromfile(tmp_path / f"{split}.bin", dtype=np.uint16)
        assert found.tolist() == [token for tokens in expected for token in tokens]
        assert info["splits"][split]["documents"] == len(texts)
        assert info["splits"][split]["tokens"] == len(found)
        assert info["splits"][split]["bytes"] == sum(map(len, texts))
        indexed, _ = open_split(tmp_path, split)
        assert indexed.sequence_lengths.tolist() == [len(tokens) for tokens in expected]


def test_large_vocabularies_get_wider_numbers(tmp_path, tokenizer):
    info = write_token_files(DOCUMENTS, tokenizer, tmp_path, CONFIG, seed=5, vocab_size=128_256)
    assert info["dtype"] == "int32"
    found = np.fromfile(tmp_path / "train.bin", dtype=np.int32)
    assert len(found) == info["splits"]["train"]["tokens"]
    assert (found == tokenizer.eos_token_id).sum() == info["splits"]["train"]["documents"]


def test_the_digest_tells_data_apart(tmp_path, tokenizer):
    def digest(documents, seed=5, config=CONFIG) -> str:
        return write_token_files(documents, tokenizer, tmp_path, config, seed=seed)["data_digest"]

    first = digest(DOCUMENTS)
    assert digest(iter(DOCUMENTS)) == first
    assert digest(DOCUMENTS[:-1]) != first
    assert digest(DOCUMENTS, seed=6) != first


def test_a_failed_write_leaves_the_files_that_were_there(tmp_path, tokenizer):
    write_token_files(DOCUMENTS, tokenizer, tmp_path, CONFIG, seed=5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken():
        yield from DOCUMENTS
        raise DataError("the last file is damaged")

    with pytest.raises(DataError, match="damaged"):
        write_token_files(broken(), tokenizer, tmp_path, CONFIG, seed=6)
    with pytest.raises(DataError, match="vocabulary of 40"):
        write_token_files(DOCUMENTS, tokenizer, tmp_path, CONFIG, seed=6, vocab_size=40)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_too_little_text_is_refused(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(DataError, match="0 different document"):
        write_token_files([Document("a", "short")], tokenizer, tmp_path, CONFIG, seed=1)
    with pytest.raises(DataError, match="2 different document"):
        write_token_files([*DOCUMENTS[:2], *DOCUMENTS[:2]], tokenizer, tmp_path, CONFIG, seed=1)
    monkeypatch.setattr(token_files, "_SMALL_CORPUS", 1)
    rare = CONFIG.model_copy(update={"calibration_fraction": 1e-9})
    with pytest.raises(DataError, match="no document fell to calibration"):
        write_token_files(DOCUMENTS, tokenizer, tmp_path, rare, seed=1)
    assert not list(tmp_path.iterdir())


def test_damaged_folders_get_one_clear_message(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"no data\.json"):
        read_info(tmp_path)
    config = CONFIG.model_copy(update={"calibration_fraction": 0.0})
    write_token_files(DOCUMENTS, tokenizer, tmp_path, config, seed=5)
    with pytest.raises(DataError, match=r"no calibration documents\n.*train, heldout"):
        open_split(tmp_path, "calibration")
    _cut(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin"):
        open_split(tmp_path, "train")
    (tmp_path / "heldout.idx").unlink()
    with pytest.raises(DataError, match=r"\.idx beside it"):
        open_split(tmp_path, "heldout")
    info = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(DataError, match="unknown format"):
        read_info(tmp_path)
    _cut(tmp_path / "data.json")
    with pytest.raises(DataError, match="run the data stage again"):
        read_info(tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])
