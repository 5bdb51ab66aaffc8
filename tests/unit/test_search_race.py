"""The order of a race, from losses that are made up."""

import json
import random

import pytest
from scipy.stats import spearmanr

from nemo_minitron.errors import SearchError, TrainingError
from nemo_minitron.json_lines import rows_to_continue
from nemo_minitron.search.race import (
    Record,
    Rung,
    Standing,
    Task,
    group_count,
    group_sizes,
    measure_in_turn,
    rank_correlation,
    run_race,
)

NAMES = list("abcdefgh")
RUNGS = [Rung(candidates=4), Rung(candidates=2, seeds=3)]
LOSSES = [
    dict(zip(NAMES, (8, 7, 6, 5, 4, 3, 2, 1), strict=True)),
    dict(zip(NAMES, (0, 0, 0, 0, 1, 2, 3, 4), strict=True)),
    dict(zip(NAMES, (0.5, 0, 9, 9, 7, 6, 9, 9), strict=True)),
]


class Course:
    """Measures by table, and counts."""

    def __init__(self, failing=(), error=TrainingError) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self._failing, self._error = failing, error

    def __call__(self, name: str, rung: int, seed: int) -> float:
        self.asked.append((name, rung, seed))
        if (name, rung) in self._failing:
            raise self._error("what went wrong\nmore")
        return LOSSES[rung][name] + 0.1 * seed


def race(course, record=None, **settings):
    record = record or Record()

    def complete(tasks):
        measure_in_turn(tasks, course, record=record, failures=(TrainingError,))

    return run_race(NAMES, RUNGS, complete, record=record, **settings)


def test_the_best_of_each_rung_go_on():
    course = Course()
    result = race(course)
    assert [list(standing.losses) for standing in result.standings] == [NAMES[::-1], list("efgh"), list("fe")]
    assert result.winner == "f"
    assert result.standings[2].losses["f"] == pytest.approx(6.1)
    assert course.asked == [
        *((name, 0, 0) for name in NAMES),
        *((name, 1, 0) for name in "hgfe"),
        *((name, 2, seed) for name in "ef" for seed in range(3)),
    ]
    # From h, g, f, e (best first) to e, f, g, h.
    assert result.correlations == [-1.0, None]


def test_baselines_run_in_the_last_rung_and_may_win():
    seen: list[Standing] = []

    def comparing(first):
        seen.append(first)
        return ["a", "e"]

    result = race(Course(), comparing=comparing)
    assert [list(standing.losses) for standing in seen] == [list("efgh")]
    assert result.standings[2].compared == ("a",)
    assert result.winner == "a"


def test_a_candidate_that_fails_is_recorded_and_the_race_goes_on():
    record = Record()
    result = race(Course(failing=[("h", 0), ("e", 1)]), record)
    assert record.failures == {"h": "TrainingError: what went wrong", "e": "TrainingError: what went wrong"}
    assert list(result.standings[0].losses) == list("gfedcba")
    assert list(result.standings[1].losses) == list("dfg")


def test_a_loss_that_is_no_number_is_a_failure(monkeypatch):
    monkeypatch.setitem(LOSSES[0], "c", float("nan"))
    record = Record()
    race(Course(), record)
    assert record.failures == {"c": "loss nan"}


def test_a_race_without_candidates_left_says_why():
    with pytest.raises(SearchError) as caught:
        race(Course(failing=[(name, 1) for name in NAMES]))
    assert "no candidate is left in rung 1" in str(caught.value)
    assert "- h: TrainingError: what went wrong" in str(caught.value)


def test_other_errors_end_the_race():
    with pytest.raises(KeyError):
        race(Course(failing=[("c", 0)], error=KeyError))


@pytest.mark.parametrize("torn", ["", '{"candidate": "h", "ru'])
def test_a_race_that_was_cut_off_goes_on_behind_its_last_candidate(tmp_path, torn):
    path = tmp_path / "measured.jsonl"
    whole = Course()
    expected = race(whole, Record(path=path))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(whole.asked)
    path.write_text("".join(lines[:10]) + torn)
    rest = Course()
    result = race(rest, Record(rows_to_continue(path), path))
    assert rest.asked == whole.asked[10:]
    assert result == expected
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(line) for line in lines]


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_spearmans(seed):
    rng = random.Random(seed)
    before = {name: rng.randrange(5) for name in NAMES}
    after = {name: rng.randrange(5) for name in NAMES[:6]}
    expected = spearmanr([before[name] for name in after], list(after.values())).statistic
    assert rank_correlation(before, after) == pytest.approx(expected)


def test_two_candidates_have_no_rank_correlation():
    assert rank_correlation({"a": 1, "b": 2}, {"a": 1, "b": 2}) is None


def test_a_candidate_that_failed_with_one_seed_has_no_loss():
    """Another group may have measured the other seed meanwhile."""
    record = Record()
    record.take([{**Task("a", 2, 1)._asdict(), "loss": 1.0}, {**Task("a", 2, 0)._asdict(), "failed": "no memory"}])
    assert record.losses("a", 2) is None
    assert record.is_settled(Task("a", 2, 2))
    assert not record.is_settled(Task("a", 1, 0))


def test_what_is_known_already_is_not_written_again(tmp_path):
    path = tmp_path / "measured.jsonl"
    record = Record(path=path)
    first = {**Task("a", 1, 0)._asdict(), "loss": 2.0}
    record.take([first])
    record.take([first, {**Task("b", 1, 0)._asdict(), "loss": 3.0}])
    assert [json.loads(line)["candidate"] for line in path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("tasks", "ranks", "unit", "least", "expected"),
    [
        (24, 4, 1, 1, 4),  # a rank each, six tasks one after the other
        (24, 4, 2, 2, 2),  # TP 2: two copies
        (3, 8, 1, 1, 4),  # one group is left over, and every candidate has two ranks
        (1, 8, 2, 2, 1),  # all together
        (12, 64, 8, 8, 8),  # fewer copies than tasks
        (5, 24, 1, 1, 6),
        (24, 8, 1, 4, 2),  # at least four ranks each
        (24, 8, 2, 3, 2),  # at least three are four, with two in each copy
        (24, 4, 1, 16, 1),  # more than there are
        (2, 1, 1, 1, 1),
    ],
)
def test_groups_are_as_many_as_the_work_and_as_large_as_can_be(tasks, ranks, unit, least, expected):
    assert group_count(tasks, ranks, group_sizes(ranks, unit, least)) == expected


@pytest.mark.parametrize("ranks", [1, 6, 24, 64])
def test_groups_share_all_ranks_equally_and_hold_complete_copies(ranks):
    for unit in (unit for unit in range(1, ranks + 1) if ranks % unit == 0):
        for least in (1, 3, 1000):
            sizes = group_sizes(ranks, unit, least)
            assert sizes[-1] == ranks
            assert all(size % unit == 0 and ranks % size == 0 for size in sizes)
            for tasks in (1, 2, 7, 1000):
                count = group_count(tasks, ranks, sizes)
                assert count * (ranks // count) == ranks
                assert ranks // count in sizes
                larger = [size for size in sizes if size > ranks // count]
                assert all(ranks // size < tasks for size in larger), "no larger group would have sufficed"
