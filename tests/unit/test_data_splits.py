"""Documents are shared out by their text alone."""

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.config.run import DataConfig
from nemo_minitron.data.documents import Document
from nemo_minitron.data.splits import _SPACES, Split, _single_spaces, assign, position, requested, split_of
from nemo_minitron.errors import DataError

CONFIG = DataConfig(sources=("x",), calibration_fraction=0.1, heldout_fraction=0.2)


def corpus(count: int) -> list[Document]:
    return [Document(str(number), hashlib.sha256(str(number).encode()).hexdigest()) for number in range(count)]


def test_the_position_is_fixed_for_all_time():
    # Moving documents between splits with a release would leak held-out text into training.
    digest = hashlib.blake2b(b"some text", digest_size=8, key=b"7").hexdigest()
    assert math.isclose(position("  some\n\ttext ", 7), int(digest, 16) / 2**64, rel_tol=1e-15)
    assert position("some text", 7) != position("some text", 8)


@given(st.text(st.sampled_from([*"ab \u00e4", *_SPACES])))
def test_spaces_are_those_that_python_splits_at(text):
    assert _single_spaces(text.encode()) == " ".join(text.split()).encode()


def test_no_space_is_forgotten():
    assert {chr(code) for code in range(0x110000) if chr(code).isspace()} == {" ", *_SPACES}


def test_fractions_are_met():
    splits = [split_of(document, CONFIG, 1) for document in corpus(5000)]
    for split, fraction in ((Split.CALIBRATION, 0.1), (Split.HELDOUT, 0.2), (Split.TRAIN, 0.7)):
        deviation = math.sqrt(5000 * fraction * (1 - fraction))
        assert abs(splits.count(split) - 5000 * fraction) < 4 * deviation


def test_a_large_corpus_is_assigned_document_by_document():
    documents = corpus(500)
    assert assign(documents, CONFIG, 3) == [split_of(document, CONFIG, 3) for document in documents]


@given(st.integers(3, 12), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_tiny_corpora_fill_every_split_in_any_order(count, seed, rng):
    documents = corpus(count)
    chosen = dict(zip((document.id for document in documents), assign(documents, CONFIG, seed), strict=True))
    assert set(chosen.values()) == set(Split)
    rng.shuffle(documents)
    assert assign(documents, CONFIG, seed) == [chosen[document.id] for document in documents]


@given(st.lists(st.integers(0, 4), min_size=3, max_size=30), st.integers(0, 50))
def test_copies_never_straddle(numbers, seed):
    documents = [Document(str(index), f"text {number}") for index, number in enumerate(numbers)]
    if len(set(numbers)) < 3:
        with pytest.raises(DataError, match="at least one each"):
            assign(documents, CONFIG, seed)
        return
    splits = assign(documents, CONFIG, seed)
    assert len(set(zip(numbers, splits, strict=True))) == len(set(numbers))


def test_a_fraction_of_zero_asks_for_nothing():
    config = DataConfig(sources=("x",), calibration_fraction=0, heldout_fraction=0)
    assert requested(config) == (Split.TRAIN,)
    assert set(assign(corpus(20), config, 0)) == {Split.TRAIN}
