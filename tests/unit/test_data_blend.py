"""Existing Megatron token files: samples are those of Megatron's own blend, splits never overlap."""

import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split, get_blend_from_list
from pydantic import ValidationError

from nemo_minitron.config.run import DataConfig
from nemo_minitron.errors import DataError
from nemo_minitron.megatron.blend import open_prefix
from nemo_minitron.megatron.data import WindowDataset, training_dataset
from nemo_minitron.megatron.token_files import open_split, write_blend_files
from tests.tiny import write_tokenizer

END = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[str]:
    """Three pairs of files with 40, 60 and 20 documents, whose first token says which document it is."""
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(7)
    for name, count in (("a", 40), ("b", 60), ("c", 20)):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for document in range(count):
            tokens = [document + 100, *rng.integers(1, 100, rng.integers(10, 60)), END]
            builder.add_document(np.array(tokens), [len(tokens)])
        builder.finalize(str(folder / f"{name}.idx"))
    return [str(folder / name) for name in "abc"]


def write(tmp_path: Path, tokenizer, **data):
    config = DataConfig(calibration_fraction=0.1, heldout_fraction=0.2, **data)
    return write_blend_files(tokenizer, tmp_path / "data", config, seed=5, vocab_size=256)


class Vocabulary:
    """What Megatron's dataset asks of a tokenizer."""

    vocab_size, eod = 256, END

    def __init__(self) -> None:
        self.unique_identifiers = OrderedDict({"class": "reference"})


def reference(prefixes, weights, sizes, *, sequence_length, seed, total):
    """Megatron's blend, put together by hand from its datasets over the first 70 % of each prefix's documents."""
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=sequence_length, blend=(prefixes, weights), split="7,1,2",
        tokenizer=Vocabulary(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    parts = []
    for prefix, size in zip(prefixes, sizes, strict=True):
        data = IndexedDataset(prefix)
        first = np.arange(round(0.7 * len(data)), dtype=np.int32)
        parts.append(GPTDataset(data, prefix, first, size, Split.train, config))
    return BlendedDataset(parts, weights, total, config)


def test_samples_are_those_of_megatrons_own_blend(tmp_path, tokenizer, prefixes):
    weights = [0.5, 0.3, 0.2]
    write(tmp_path, tokenizer, blend=[[weight, prefix] for weight, prefix in zip(weights, prefixes, strict=True)])
    ours = training_dataset(tmp_path / "data", 32, 200, seed=11)
    theirs = reference(prefixes, weights, [101, 61, 41], sequence_length=32, seed=11, total=200)
    assert len(ours) >= 200
    for index in range(200):
        assert ours[index].keys() == {"tokens", "labels", "loss_mask", "position_ids"}
        for name in ("tokens", "labels"):
            assert ours[index][name].tolist() == theirs[index][name].tolist(), index
    assert not ours[None]["loss_mask"].any()


def test_no_document_is_in_two_splits(tmp_path, tokenizer, prefixes):
    info = write(tmp_path, tokenizer, blend=[[1, prefix] for prefix in prefixes])
    counts = {name: split["documents"] for name, split in info["splits"].items()}
    assert counts == {"train": 28 + 42 + 14, "calibration": 4 + 6 + 2, "heldout": 8 + 12 + 4}
    found = {}
    for split, first, stop in (("calibration", 0.7, 0.8), ("heldout", 0.8, 1.0)):
        indexed, _ = open_split(tmp_path / "data", split)
        expected = []
        for prefix in prefixes:
            data = IndexedDataset(prefix)
            expected += [data[number].tolist() for number in range(round(first * len(data)), round(stop * len(data)))]
        assert [indexed[number].tolist() for number in range(len(indexed))] == expected
        found[split] = expected
    assert len(WindowDataset(tmp_path / "data", "heldout", 16)) > 5


def test_documents_of_a_blend_are_kept_apart_by_their_ends(tmp_path, tokenizer, prefixes):
    write(tmp_path, tokenizer, blend=[[1, prefix] for prefix in prefixes], reset_attention_mask=True)
    samples = training_dataset(tmp_path / "data", 32, 50, seed=3)
    for index in range(50):
        tokens, positions = (samples[index][name].tolist() for name in ("tokens", "position_ids"))
        assert [place for place in range(1, 32) if positions[place] == 0] == [
            place for place in range(1, 32) if tokens[place - 1] == END
        ]


def test_documents_without_an_end_cannot_be_kept_apart(tmp_path, tokenizer, prefixes):
    builder = IndexedDatasetBuilder(str(tmp_path / "endless.bin"), dtype=np.uint16)
    for document in range(10):
        builder.add_document(np.arange(1, 20 + document), [19 + document])
    builder.finalize(str(tmp_path / "endless.idx"))
    prefix = str(tmp_path / "endless")
    write(tmp_path, tokenizer, blend=prefix)
    with pytest.raises(DataError, match=r"endless: a document ends with token \d+ under data.reset_attention_mask"):
        write(tmp_path, tokenizer, blend=prefix, reset_attention_mask=True)


def test_splits_of_their_own(tmp_path, tokenizer, prefixes):
    info = write(
        tmp_path, tokenizer, blend=prefixes[0], calibration_blend=[prefixes[1]], heldout_blend=f"0.5 {prefixes[2]}"
    )
    counts = {name: split["documents"] for name, split in info["splits"].items()}
    assert counts == {"train": 40, "calibration": 60, "heldout": 20}
    samples = training_dataset(tmp_path / "data", 32, 100, seed=3)
    assert len(samples) >= 100
    seen = {int(token) for index in range(len(samples)) for token in samples[index]["tokens"] if token >= 100}
    assert seen == set(range(100, 140)), "every document is trained on"


def test_without_weights_prefixes_are_read_once(tmp_path, tokenizer, prefixes):
    write(tmp_path, tokenizer, blend=prefixes)
    assert len(training_dataset(tmp_path / "data", 32, 20, seed=3)) == 20
    with pytest.raises(DataError, match=r"1000 are wanted\n.*without weights"):
        training_dataset(tmp_path / "data", 32, 1000, seed=3)


@pytest.mark.parametrize(
    "spelling",
    [
        [[0.7, "a"], [0.3, "b"]],
        [0.7, "a", 0.3, "b"],
        ["0.7", "a", "0.3", "b.bin"],
        "0.7 a 0.3 b",
        (("0.7", "a.idx"), (0.3, "b")),
    ],
)
def test_every_spelling_is_the_same_blend(spelling):
    config = DataConfig(blend=spelling)
    assert config.blend == ((0.7, "a"), (0.3, "b"))
    prefixes, weights = get_blend_from_list(["0.7", "a", "0.3", "b"])
    assert config.blend == tuple(zip(weights, prefixes, strict=True))
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config
    assert DataConfig(blend="my prefix").blend == ((None, "my prefix"),)
    assert DataConfig(blend=["a", "b"]).blend == ((None, "a"), (None, "b"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "sources is missing"),
        ({"sources": ["a"], "blend": ["b"]}, "both given"),
        ({"sources": ["a"], "heldout_blend": ["b"]}, "go with blend"),
        ({"blend": [[0.5, "a"], [None, "b"]]}, "weights for all prefixes, or for none"),
        ({"blend": [0.5, "a", "b"]}, "no pairs"),
        ({"blend": ["a", 0.5]}, "0.5 stands behind prefixes without weights"),
        ({"blend": [[-1, "a"]]}, "-1 is no weight"),
        ({"blend": [["a", 0.5]]}, "no weight and prefix"),
        ({"blend": {"a": 1}}, "a blend is written as"),
        ({"blend": []}, "a blend is written as"),
    ],
)
def test_bad_blends_are_refused(data, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**data)


def test_bad_files_are_named(tmp_path, tokenizer, prefixes):
    with pytest.raises(DataError, match=r"nowhere\.idx: No such file"):
        write(tmp_path, tokenizer, blend=str(tmp_path / "nowhere"))
    for suffix in (".bin", ".idx"):
        (tmp_path / f"cut{suffix}").write_bytes(Path(prefixes[0] + suffix).read_bytes())
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"cut\.bin: \d+ bytes, where the index says"):
        write(tmp_path, tokenizer, blend=str(tmp_path / "cut"))
    (tmp_path / "cut.idx").write_bytes(b"not an index")
    with pytest.raises(DataError, match=r"cut\.idx: is no index"):
        write(tmp_path, tokenizer, blend=str(tmp_path / "cut"))
    config = DataConfig(blend=prefixes[0], calibration_fraction=0.1, heldout_fraction=0.2)
    with pytest.raises(DataError, match=r"holds token .*\n.*vocabulary of 100"):
        write_blend_files(tokenizer, tmp_path / "data", config, seed=5, vocab_size=100)
    few = DataConfig(blend=prefixes[2], calibration_fraction=0.01, heldout_fraction=0.2)
    with pytest.raises(DataError, match="no document falls to calibration"):
        write_blend_files(tokenizer, tmp_path / "data", few, seed=5, vocab_size=256)
    assert not [path for path in (tmp_path / "data").iterdir()]


@pytest.mark.parametrize(
    ("dtype", "code", "lengths", "starts", "message"),
    [
        (np.float32, 7, (3, 2), (0, 3), "holds float32 numbers, which are no tokens"),
        (np.float64, 6, (3, 2), (0, 3), "holds float64 numbers, which are no tokens"),
        (np.uint16, 8, (3, 2), (2, 0), "do not lie one behind the other"),
        (np.uint16, 8, (3, 2), (0, 0), "do not lie one behind the other"),
        (np.uint16, 8, (3, 2), (0, 30), "do not lie one behind the other"),
        (np.uint16, 8, (7, -2), (0, 7), "do not lie one behind the other"),
        (np.uint16, 4, (3, 2), (0, 3), "10 bytes, where the index says 20"),
        (np.uint16, 99, (3, 2), (0, 3), "99 is not a valid DType"),
    ],
)
def test_an_index_that_contradicts_its_tokens_is_refused(tmp_path, *, dtype, code, lengths, starts, message):
    (tmp_path / "a.bin").write_bytes(np.arange(5).astype(dtype).tobytes())
    pointers = np.array(starts, np.int64) * {4: 4, 99: 2}.get(code, np.dtype(dtype).itemsize)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 2, 3)
    arrays = (np.array(lengths, np.int32), pointers, np.arange(3, dtype=np.int64))
    (tmp_path / "a.idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))
    with pytest.raises(DataError, match=message):
        open_prefix(str(tmp_path / "a"))
