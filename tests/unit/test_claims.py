"""The pages say what the results file says; verdicts follow from differences worked out by hand."""

import math

import pytest

from benchmarks.claims import page
from benchmarks.claims.results import Results
from benchmarks.claims.table import CACHED, CLAIMS, METRICS, When, trials

TABLES = {path.name: path for path in (page.PAGE, page.OBJECTIVES_PAGE)}


def line(trial, nats, seed=1, **more):
    student, lesson = trial.key
    row = {"student": student, "lesson": lesson, "seed": seed, "nats": nats, "kl": nats, "teacher_nats": [1.0, 2.0]}
    row |= {"parameters": 1_000_000, "seconds": 60.0, "cpu_seconds": 30.0, "tokens": 512, "precision": "fp32"}
    return {**row, "commit": "abc", **more}


def test_the_pages_hold_what_the_newest_results_say():
    newest = page.newest_results()
    for path, parts in page.pages(Results.load(newest), newest.name).items():
        text = path.read_text(encoding="utf-8")
        for name, part in parts.items():
            assert f"{page.begin(name)}\n\n{part}\n\n{page.END}" in text


def test_every_result_belongs_to_a_trial_of_the_table():
    known = {trial.key for trial in trials(CLAIMS)}
    assert {(row["student"], row["lesson"]) for row in Results.load(page.newest_results()).every()} <= known


def test_findings_speak_of_rows_that_their_claim_has():
    for claim in CLAIMS:
        labels = [row.label for row in claim.rows]
        assert len(set(labels)) == len(labels)
        assert {label for finding in claim.findings for label in (finding.better, finding.other)} <= set(labels)


def test_a_trial_of_several_claims_runs_once_and_what_is_urgent_runs_first():
    found = trials(CLAIMS)
    assert len({trial.key for trial in found}) == len(found)
    ranks = {row.trial(When.AFTER): row.rank for claim in reversed(CLAIMS) for row in claim.rows}
    urgent = [number for number, trial in enumerate(found) if ranks.get(trial) == 0]
    late = [number for number, trial in enumerate(found) if ranks.get(trial) == 2]
    assert max(urgent) < min(late)


def test_a_difference_is_taken_window_by_window_over_the_seeds_that_have_both():
    """3 - 2 and 6 - 4 at seed 1, 5 - 5 at seed 2: mean 1, deviation 1, error 1 / sqrt(3)."""
    one, other = (row.trial(When.AFTER) for row in METRICS.rows[:2])
    rows = [line(one, [3.0, 6.0]), line(other, [2.0, 4.0]), line(one, [5.0], 2), line(other, [5.0], 2)]
    rows.append(line(one, [99.0], 3))
    found = Results(rows).difference(one, other, METRICS.findings[0].measure)
    assert (found.mean, found.seeds) == (1.0, (1, 2))
    assert found.error == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize(
    ("influence", "loss", "told"),
    [
        ([3.0, 3.1, 3.0], [2.0, 2.0, 2.0], "agrees"),
        ([2.0, 2.0, 2.0], [3.0, 3.1, 3.0], "disagrees"),
        ([2.0, 4.0, 2.1], [3.0, 2.0, 3.0], "undecided"),
    ],
)
def test_a_difference_within_two_errors_decides_nothing(influence, loss, told):
    by_influence, by_loss = (row.trial(When.AFTER) for row in METRICS.rows[:2])
    results = Results([line(by_influence, influence), line(by_loss, loss)])
    assert page.verdict(METRICS.findings[0], METRICS, results) == told


@pytest.mark.parametrize(
    ("cached", "told"), [([2.001, 2.002], "agrees"), ([2.5, 2.51], "disagrees"), ([1.0, 3.0], "undecided")]
)
def test_where_the_paper_found_no_difference_a_sure_one_disagrees(cached, told):
    resident, drawn = (row.trial(When.AFTER) for row in CACHED.rows)
    results = Results([line(resident, [2.0, 2.0]), line(drawn, cached)])
    assert page.verdict(CACHED.findings[0], CACHED, results) == told


def test_what_has_not_run_is_not_claimed():
    text = page.section(METRICS, Results([]))
    assert text.count(page.NOT_RUN) == len(METRICS.rows) + len(METRICS.findings) + 1
    assert "agrees" not in text


def test_the_table_shows_perplexities_of_mean_nats_and_minutes():
    before, after = (METRICS.rows[0].trial(when) for when in (When.BEFORE, When.AFTER))
    results = Results([line(before, [4.0, 3.0]), line(after, [2.0, 3.0]), line(after, [2.5, 2.5], 2)])
    text = page.section(METRICS, results)
    assert f"| block influence | 1.0 | {math.exp(3.5):.2f} | {math.exp(2.5):.2f} | 3.500 | 2.500 | 1, 2 |" in text
    assert "--claim depth-metric`: 3 min, 2 CPU min; seeds 1, 2." in text
