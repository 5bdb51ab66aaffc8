"""Dirty text: what is no text costs that document and is counted; what spells a special token is text."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from nemo_minitron.data.documents import read_documents
from nemo_minitron.data.encoder import TextEncoder
from nemo_minitron.data.tokenizer import encode_documents
from nemo_minitron.errors import DataError
from tests.tiny import write_tokenizer

DIRTY = [
    b'{"text": "one"}',
    b'{"text": null}',
    b'{"text": "half a pair: \\ud800"}',
    b'{"text": "the other half: \\udc00 alone"}',
    b'{"text": ["a list"]}',
    b'{"body": "no text"}',
    b'["no object"]',
    b'{"text": "cut o',
    b'{"text": "k\xf6ln"}',
    b"[" * 100_000,
    b'{"text": "two", "id": 1' + b"1" * 5000 + b"}",
    b'{"text": "a pair: \\ud83d\\ude00"}',
]


def write(path: Path, *lines: bytes, good: int = 0) -> Path:
    rows = [json.dumps({"text": f"good {number}"}).encode() for number in range(good)]
    path.write_bytes(b"\n".join([*lines, *rows]) + b"\n")
    return path


def test_each_dirty_line_costs_that_document_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", *DIRTY, good=3)
    found = [document.text for document in read_documents(path, max_bad_fraction=0.8)]
    assert found == ["one", "a pair: \U0001f600", "good 0", "good 1", "good 2"]


def test_above_the_limit_reasons_numbers_and_places_are_told(tmp_path):
    path = write(tmp_path / "a.jsonl", *DIRTY, good=88)
    assert len(list(read_documents(path))) == 90, "exactly a tenth is allowed"
    path = write(tmp_path / "a.jsonl", *DIRTY, good=87)
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    told = str(caught.value)
    assert "10 of 99 documents are no texts" in told
    assert "- 2: half a surrogate pair" in told
    assert f"{path}, line 3: character 13 is '\\ud800'" in told
    assert f"{path}, line 2: 'text' is null" in told
    assert "data.max_bad_fraction=0.102" in told


def test_line_numbers_go_on_from_part_to_part(tmp_path):
    from nemo_minitron.data.documents import PartReader, cut
    from nemo_minitron.data.survey import survey

    path = write(tmp_path / "a.jsonl", b"", *[b'{"text": "line %d"}' % number for number in range(2, 60)], b"  ")
    files = survey([path]).files
    base, found = 0, []
    parts = list(cut(files, 100))
    assert len(parts) > 5
    for part in parts:
        reader = PartReader(files[0], part, "text")
        found += [(item.number + base, item.text) for item in reader]
        base += reader.length
    assert found == [(number, f"line {number}") for number in range(2, 60)]


def byte_level(*special: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def test_text_that_spells_a_special_token_is_text():
    tokenizer = byte_level("<|end|>", "<|im_end|>")
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.token_to_id("<|end|>"))]
    )
    end, think = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<think>")
    text = "a<|im_end|>b<|end|><think>"
    (tokens,) = TextEncoder(tokenizer.to_str(), end, 300).encode([text])
    assert tokens[0] == tokens[-1] == end
    assert tokens[-2] == think, "an ordinary added token is a word like any other"
    assert not np.isin(tokens[1:-1], [end, tokenizer.token_to_id("<|im_end|>")]).any()
    assert tokenizer.decode(tokens[1:-1].tolist(), skip_special_tokens=False) == text
    (parsed,) = TextEncoder(tokenizer.to_str(), end, 300, parse_special_tokens=True).encode([text])
    assert np.isin(parsed, [end, tokenizer.token_to_id("<|im_end|>")]).sum() == 4, "BOS, both in the text, and the end"


def test_a_model_that_knows_special_pieces_itself_does_not_find_them_in_text():
    """SentencePiece's `</s>` is a piece of the Unigram vocabulary; as text it is spelled."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((char, -3.0) for char in "▁ab</s>"), ("▁a", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    assert 1 in tokenizer.encode("a b</s>b").ids
    (tokens,) = TextEncoder(tokenizer.to_str(), 1, 20).encode(["a b</s>b \u4e00"])
    assert (tokens == 1).sum() == 1
    assert tokens[-1] == 1
    assert 0 in tokens, "what is unknown stays unknown"
    assert tokenizer.decode(tokens[:-2].tolist(), skip_special_tokens=False).strip() == "a b</s>b"


def test_ids_of_clean_text_are_those_of_transformers(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    text = "the river <|end|> of the king"
    (tokens,) = encode_documents([text], tokenizer, 256)
    assert tokens.tolist() == [*tokenizer(text, split_special_tokens=True).input_ids, tokenizer.eos_token_id]
    (parsed,) = encode_documents([text], tokenizer, 256, parse_special_tokens=True)
    assert parsed.tolist() == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert tokens.tolist() != parsed.tolist()
