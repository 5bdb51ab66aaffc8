"""The score stage: cut off and resumed, in parts, at other numbers of ranks, with the same scores."""

import pytest
import torch

from nemo_minitron.arch.axes import Axis
from nemo_minitron.errors import ScoresError
from nemo_minitron.pruning.scores import Scores
from tests import jobs
from tests.parallel.score_jobs import killed, score_all, score_stage, stop_and_go_on
from tests.ranks import RankError, run_on_ranks
from tests.tiny import write_corpus, write_llama

FILE = "scores.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Token files and a teacher; the scores of everything, of two parts, and at the other FFN site."""
    folder = tmp_path_factory.mktemp("score")
    write_llama(folder / "hf")
    write_corpus(folder / "corpus")
    run_on_ranks(1, jobs.prepare, folder)
    runs = {
        "complete": {},
        "first": {"samples": 4},
        "second": {"first_sample": 4, "samples": 7},
        "before": {"ffn_site": "before_activation", "samples": 4},
    }
    (results,) = run_on_ranks(1, score_all, folder, [(folder / name, how) for name, how in runs.items()])
    return folder, dict(zip(runs, results, strict=True))


def assert_same(got: Scores, expected: Scores, tolerance: float) -> None:
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(
            got.tensors[name], tensor, rtol=tolerance, atol=0.0, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_a_kill_at_any_moment_costs_nothing_but_time(made):
    folder, results = made
    whole = (folder / "complete" / FILE).read_bytes()
    for batches in (2, 5):  # before the first save, and between two
        out = folder / f"killed after {batches}"
        with pytest.raises(RankError, match="died without a word"):
            run_on_ranks(1, killed, folder, out, batches)
        (result,) = run_on_ranks(1, score_stage, folder, out, {})
        assert (out / FILE).read_bytes() == whole
        assert result["calibration_nats"] == results["complete"]["calibration_nats"]
        assert result["batches"] == 11 - batches // 3 * 3, "it did not go on from the newest save"
        assert [path.name for path in out.iterdir()] == [FILE]


def test_a_signal_saves_and_the_next_run_goes_on(made):
    folder, _ = made
    ((stopped, result),) = run_on_ranks(1, stop_and_go_on, folder, folder / "stopped", 5)
    assert stopped == {"stopped": 5}
    assert result["batches"] == 6
    assert (folder / "stopped" / FILE).read_bytes() == (folder / "complete" / FILE).read_bytes()


def test_another_number_of_ranks_goes_on_too(made):
    """Two data-parallel ranks are stopped by a signal that reaches one of them; one rank takes over."""
    folder, results = made
    out = folder / "two then one"
    with pytest.raises(RankError, match="died without a word"):
        run_on_ranks(2, killed, folder, out, 3)
    (result,) = run_on_ranks(1, score_stage, folder, out, {})
    assert result["batches"] == 11 - 6
    assert_same(Scores.load(out / FILE), Scores.load(folder / "complete" / FILE), 1e-12)
    assert result["calibration_nats"] == pytest.approx(results["complete"]["calibration_nats"], rel=1e-6)
    for stopped, finished in run_on_ranks(2, stop_and_go_on, folder, folder / "two", 2):
        assert (stopped, finished["batches"]) == ({"stopped": 2}, 4)
    assert_same(Scores.load(folder / "two" / FILE), Scores.load(folder / "complete" / FILE), 1e-12)


def test_parts_merge_into_the_whole(made):
    folder, results = made
    whole, first, second = (Scores.load(folder / name / FILE) for name in ("complete", "first", "second"))
    assert (first.samples, second.samples, results["second"]["first_sample"]) == (4, 7, 4)
    for merged in (first.merge(second), second.merge(first)):
        assert_same(merged, whole, 1e-12)
        assert merged.provenance == whole.provenance
    with pytest.raises(ScoresError, match=r"samples 0-3 of data .* are in both"):
        whole.merge(first)


def test_the_other_ffn_site_measures_the_gate(made):
    folder, _ = made
    first, before = (Scores.load(folder / name / FILE) for name in ("first", "before"))
    assert before.ffn_site == "before_activation"
    assert torch.equal(before.importance(Axis.HEAD, 0), first.importance(Axis.HEAD, 0))
    assert not torch.allclose(before.importance(Axis.FFN, 0), first.importance(Axis.FFN, 0))
    with pytest.raises(ScoresError, match="FFN sites: after_activation and before_activation"):
        first.merge(before)
