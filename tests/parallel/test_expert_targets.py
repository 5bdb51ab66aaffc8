"""Targets of a teacher with experts: ranks that share them write the cache that one rank writes."""

from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.cache.folder import TargetCache
from nemo_minitron.config.parallel import ParallelConfig
from tests.parallel.expert_jobs import RandomSamples, write_targets
from tests.ranks import run_on_ranks

LAYOUTS = {
    "DP2": (2, ParallelConfig(), [[0, 2], [1]]),
    "EP2": (2, ParallelConfig(expert=2), [[0, 1, 2], []]),
    "EP2 in DP4": (4, ParallelConfig(expert=2), [[0, 2], [], [1], []]),
    "TP2 EP2": (4, ParallelConfig(tensor=2, expert=2), [[0, 1, 2], [], [], []]),
}
"""Processes, layout, and the shards that each rank writes. There are three, so that a last round leaves some out."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TargetCache:
    folder = tmp_path_factory.mktemp("alone")
    assert run_on_ranks(1, write_targets, folder, ParallelConfig()) == [[0, 1, 2]]
    return TargetCache(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_is_the_same_at_every_layout(alone: TargetCache, layout: str, tmp_path: Path) -> None:
    world_size, parallel, shards = LAYOUTS[layout]
    assert run_on_ranks(world_size, write_targets, tmp_path, parallel, timeout=60) == shards
    cache, samples = TargetCache(tmp_path), RandomSamples()
    for index in range(samples.COUNT):
        tokens = samples[index]["tokens"].numpy()
        expected, found = alone.get(index, tokens), cache.get(index, tokens)
        assert expected.tail is not None
        assert found.tail is not None
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.tail, expected.tail, rtol=1e-5, atol=1e-6)
