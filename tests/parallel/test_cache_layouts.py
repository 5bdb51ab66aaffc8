"""A cache is the same from every layout, and a student learns from it as from the teacher itself (fp32, tiny model)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_minitron.cache.entries import SampleTargets
from nemo_minitron.cache.folder import TargetCache
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.cache import CacheConfig, TargetKind
from nemo_minitron.config.parallel import ParallelConfig
from tests import jobs
from tests.parallel import cache_jobs
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow

LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor=2)),
    "dp2": (2, ParallelConfig()),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
}
SAMPLED = CacheConfig(kind=TargetKind.SAMPLED, draws=20, micro_batch_size=4, samples_per_shard=50)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Any]:
    """Teacher, token files, student, and a cache with every probability, made on one rank."""
    folder = tmp_path_factory.mktemp("cache")
    write_llama(folder / "hf", tied=False, trained_steps=100)
    write_corpus(folder / "corpus")
    run_on_ranks(1, jobs.prepare, folder)
    config = jobs.config_for(folder / "hf", folder / "corpus")
    vocabulary = open_checkpoint(folder / "teacher").spec.vocab_size
    full = CacheConfig(kind=TargetKind.TOP_K, k=vocabulary, micro_batch_size=4, samples_per_shard=64)
    made = (folder / "teacher", folder / "data", config)
    assert run_on_ranks(1, cache_jobs.write, folder / "full", *made, full) == [True]
    assert run_on_ranks(1, cache_jobs.write, folder / "sampled", *made, SAMPLED) == [True]
    return {"root": folder, "config": config}


def config_at(places: dict[str, Any], parallel: ParallelConfig) -> Any:
    return places["config"].model_copy(update={"parallel": parallel})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_draws_are_the_same_at_every_layout(places, tmp_path, layout):
    ranks, parallel = LAYOUTS[layout]
    root: Path = places["root"]
    config = config_at(places, parallel)
    run_on_ranks(ranks, cache_jobs.write, tmp_path / "cache", root / "teacher", root / "data", config, SAMPLED)
    one, other = TargetCache(root / "sampled"), TargetCache(tmp_path / "cache")
    assert one.manifest == other.manifest
    samples = training_samples(root / "data", places["config"])
    differing = 0
    for sample, tokens in enumerate(samples):
        found = [drawn_ids(cache.get(sample, tokens)) for cache in (one, other)]
        differing += sum(a != b for a, b in zip(*found, strict=True))
    # Another order of additions may round a logit across a random number, in about one draw of a million.
    assert differing <= 1e-3 * len(samples) * len(samples[0])


def training_samples(data: Path, config: Any) -> list[np.ndarray]:
    """Tokens of every sample in training order."""
    return run_on_ranks(1, cache_jobs.samples, data, config)[0]


def drawn_ids(targets: SampleTargets) -> list[tuple[tuple[int, int], ...]]:
    """Ids and counts of each token."""
    ends = np.cumsum(targets.lengths)
    pairs = list(zip(targets.ids.tolist(), targets.values.tolist(), strict=True))
    return [tuple(pairs[end - length : end]) for end, length in zip(ends, targets.lengths, strict=True)]


@pytest.fixture(scope="module")
def from_the_teacher(places) -> list[float]:
    root = places["root"]
    where = root / "student", root / "teacher", root / "data"
    return run_on_ranks(1, jobs.distill_losses, *where, places["config"])[0]


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_every_probability_cached_trains_like_the_teacher_itself(places, from_the_teacher, layout):
    ranks, parallel = {"one": (1, ParallelConfig()), **LAYOUTS}[layout]
    root = places["root"]
    where = root / "student", root / "full", root / "data"
    for rows in run_on_ranks(ranks, cache_jobs.losses, *where, config_at(places, parallel)):
        np.testing.assert_allclose([row["loss"] for row in rows], from_the_teacher, rtol=1e-5)


def test_a_student_learns_from_draws(places, from_the_teacher):
    root = places["root"]
    rows = run_on_ranks(1, cache_jobs.losses, root / "student", root / "sampled", root / "data", places["config"])[0]
    fall = rows[0]["kd"] - rows[-1]["kd"]
    assert fall == pytest.approx(from_the_teacher[0] - from_the_teacher[-1], rel=0.25)
