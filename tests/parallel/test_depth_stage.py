"""Depth metrics as the score stage measures them: metrics of one's own from a recipe, and going on after a kill."""

import pytest
import torch

from nemo_minitron.config.depth import DepthConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.stages.depth import load_metrics
from tests.parallel.depth_jobs import Misses, cut_off_and_go_on, stage
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama
from tests.tolerances import TOL


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    write_llama(folder / "hf")
    write_corpus(folder / "corpus", documents=30)
    (result,) = run_on_ranks(1, cut_off_and_go_on, folder)
    return folder, result


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **TOL[torch.float32], msg=lambda text, n=name: f"{n}: {text}")


def test_every_metric_of_the_recipe_is_measured(measured):
    whole = measured[1]["complete"]
    assert {name.split(".")[1] for name in whole} == {
        "blocks",
        "samples",
        "lm_loss",
        "logit_mse",
        "Misses",
        "LastToken",
    }
    assert whole["depth.samples"] == 7
    assert whole["depth.lm_loss.count"] == whole["depth.Misses.count"] == 7 * 24
    assert whole["depth.LastToken.count"] == 10
    assert len(whole["depth.blocks"]) == 4 + 3


def test_what_was_cut_off_goes_on_and_comes_to_the_same(measured):
    result = measured[1]
    assert result["cut"] == [1, 2, 3, 4]
    assert result["seen"] == [4, 5, 6, 7], "it measured again what was saved, or left something out"
    same(result["resumed"], result["complete"])


def test_a_damaged_partial_file_means_beginning_again(measured):
    result = measured[1]
    assert result["again"] == [1, 2, 3, 4, 5, 6, 7]
    same(result["damaged"], result["complete"])


def test_it_goes_on_with_more_data_parallel_ranks(measured):
    folder, result = measured
    for tensors, seen in run_on_ranks(2, go_on, folder):
        assert seen == [5, 7]
        same(tensors, result["complete"])


def go_on(folder):
    return stage(folder, partial=folder / "partial", kept_seconds=1e9)


def test_metrics_of_a_recipe_are_imported_or_all_reported():
    loaded = load_metrics(DepthConfig(metrics=("lm_loss", "tests.parallel.depth_jobs:Misses")))
    assert list(loaded) == ["Misses"]
    assert isinstance(loaded["Misses"], Misses)
    with pytest.raises(ConfigError) as caught:
        load_metrics(DepthConfig(metrics=("no.such:one", "tests.parallel.depth_jobs:two", "math:pi", "lm_loss")))
    told = "\n".join(caught.value.problems)
    assert "no.such:one: No module named 'no'; is its folder on PYTHONPATH?" in told
    assert "tests.parallel.depth_jobs:two: module" in told
    assert "math:pi: has no methods batches(tokenizer) and measure(batch, nats, correct)" in told
