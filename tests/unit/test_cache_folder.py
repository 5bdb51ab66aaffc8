"""Cached targets: the bytes, the shards, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.cache.entries import Coding, SampleTargets
from nemo_minitron.cache.folder import CacheManifest, CacheWriter, TargetCache, shard_path
from nemo_minitron.config.cache import TargetKind
from nemo_minitron.errors import CacheError, MinitronError

TOKENS = 5


def manifest(**changes: object) -> CacheManifest:
    values = {
        "kind": TargetKind.SAMPLED,
        "width": 50,
        "temperature": 1.0,
        "vocab_size": 1000,
        "samples": 7,
        "sequence_length": TOKENS,
        "samples_per_shard": 3,
        "seed": 1,
        "order_digest": "order",
        "tokenizer_digest": "tokenizer",
        "teacher_digest": "teacher",
    }
    return CacheManifest(**(values | changes))


def drawn(coding: Coding, seed: int, tokens: int = TOKENS) -> SampleTargets:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, min(coding.width, coding.vocab_size) + 1, tokens)
    entries = int(lengths.sum())
    ids = rng.integers(0, coding.vocab_size, entries)
    if coding.kind is TargetKind.SAMPLED:
        return SampleTargets(lengths, ids, rng.integers(1, coding.width + 1, entries))
    values = rng.standard_normal(entries).astype(np.float32)
    return SampleTargets(lengths, ids, values, rng.random(tokens).astype(np.float32))


def same(one: SampleTargets, other: SampleTargets) -> bool:
    tails = [target.tail for target in (one, other)]
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("lengths", "ids", "values"))
        and (tails[0] is None) == (tails[1] is None)
        and (tails[0] is None or np.array_equal(*tails))
    )


def tokens_of(sample: int) -> np.ndarray:
    return np.arange(TOKENS) + 100 * sample


def write(folder: Path, made: CacheManifest) -> list[SampleTargets]:
    writer = CacheWriter(folder, made)
    samples = [drawn(made.coding, seed) for seed in range(made.samples)]
    for shard in writer.missing():
        own = made.shard_samples(shard)
        writer.write(shard, [samples[index] for index in own], [tokens_of(index) for index in own])
    return samples


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(TargetKind),
    vocab=st.sampled_from([2, 300, 49152, 128256, 262144, 1 << 20]),
    width=st.sampled_from([1, 50, 63, 64, 300]),
    seed=st.integers(0, 1000),
)
def test_bytes_return_what_was_stored(kind, vocab, width, seed):
    coding = Coding(kind=kind, vocab_size=vocab, width=width)
    targets = drawn(coding, seed)
    assert same(coding.decode(coding.encode(targets), TOKENS), targets)


def test_fifty_draws_with_twelve_ids_take_three_bytes_an_id():
    """The figure of arXiv:2503.16870: 24 bits an entry, here with one byte a token beside."""
    coding = Coding(kind=TargetKind.SAMPLED, vocab_size=128256, width=50)
    targets = SampleTargets(np.array([12]), np.arange(12) + 128000, np.array([39] + [1] * 11))
    assert len(coding.encode(targets)) == 12 * 3 + 1


@pytest.mark.parametrize("kind", list(TargetKind))
def test_samples_come_back_from_shards(tmp_path, kind):
    made = manifest(kind=kind)
    samples = write(tmp_path, made)
    cache = TargetCache(tmp_path)
    cache.check()
    assert cache.manifest == made
    assert all(same(cache.get(index, tokens_of(index)), samples[index]) for index in (6, 0, 3, 2, 5, 1, 4))


def test_targets_of_other_tokens_are_refused(tmp_path):
    write(tmp_path, manifest())
    with pytest.raises(CacheError, match="sample 2 was made of other tokens"):
        TargetCache(tmp_path).get(2, tokens_of(3))


@pytest.mark.parametrize("place", [0, 10, 40, -1])
def test_a_damaged_shard_is_named_and_alone_written_again(tmp_path, place):
    samples = write(tmp_path, manifest())
    damaged = shard_path(tmp_path, 1)
    data = bytearray(damaged.read_bytes())
    data[place] ^= 0x20
    damaged.write_bytes(data)
    before = {shard: shard_path(tmp_path, shard).stat().st_mtime_ns for shard in (0, 2)}
    with pytest.raises(CacheError, match=r"targets-000001\.bin: damaged"):
        [TargetCache(tmp_path).get(index, tokens_of(index)) for index in range(3, 6)]
    assert list(CacheWriter(tmp_path, manifest()).missing()) == [1]
    write(tmp_path, manifest())
    assert before == {shard: shard_path(tmp_path, shard).stat().st_mtime_ns for shard in (0, 2)}
    assert same(TargetCache(tmp_path).get(4, tokens_of(4)), samples[4])


def test_every_cut_of_a_shard_is_noticed(tmp_path):
    write(tmp_path, manifest(samples=2, samples_per_shard=2))
    path = shard_path(tmp_path, 0)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(MinitronError):
            TargetCache(tmp_path).check()


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, manifest())
    shard_path(tmp_path, 2).unlink()
    with pytest.raises(CacheError, match=r"targets-000002\.bin: missing"):
        TargetCache(tmp_path).check()


def test_another_cache_in_the_folder_is_left_alone(tmp_path):
    write(tmp_path, manifest())
    with pytest.raises(CacheError, match="seed is 1, not 2"):
        CacheWriter(tmp_path, manifest(seed=2))
    assert CacheManifest.load(tmp_path) == manifest()


def test_shards_of_another_cache_are_refused(tmp_path):
    write(tmp_path / "one", manifest())
    write(tmp_path / "two", replace(manifest(), order_digest="another"))
    shard_path(tmp_path / "one", 0).replace(shard_path(tmp_path / "two", 0))
    with pytest.raises(CacheError, match="belongs to another cache"):
        TargetCache(tmp_path / "two").check()


def test_what_a_run_expects_is_compared(tmp_path):
    write(tmp_path, manifest())
    TargetCache(tmp_path).check_fits(vocab_size=1000, order_digest="order")
    with pytest.raises(CacheError, match=r"order_digest is order, not new; vocab_size is 1000, not 7"):
        TargetCache(tmp_path).check_fits(order_digest="new", vocab_size=7)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "nemo_minitron.target_cache", "version": 9}'])
def test_a_manifest_that_is_none(tmp_path, text):
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(CacheError, match=r"cache\.json: cannot be read"):
        TargetCache(tmp_path)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (SampleTargets(np.array([1]), np.array([1000]), np.array([1])), "vocabulary of 1000"),
        (SampleTargets(np.array([1]), np.array([3]), np.array([51])), "counts of 51 to 51 in 50 draws"),
        (SampleTargets(np.array([51]), np.zeros(51, np.int64), np.ones(51, np.int64)), "at most 50"),
        (SampleTargets(np.array([2]), np.array([3]), np.array([1])), "lengths for 2"),
    ],
)
def test_what_does_not_fit_is_refused(targets, message):
    with pytest.raises(CacheError, match=message):
        manifest().coding.encode(targets)
