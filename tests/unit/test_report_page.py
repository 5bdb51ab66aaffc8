"""The report as its readers meet it: on a screen, a phone or paper, in the dark, unseen, and without a network."""

import base64
import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
from typer.testing import CliRunner

from nemo_minitron.cli import closing
from nemo_minitron.cli.main import app
from nemo_minitron.cli.recipes import find
from nemo_minitron.config.load import load_recipe, to_yaml
from nemo_minitron.report import build, curves, drawing, tables
from nemo_minitron.report.compare import Compared, comparison
from nemo_minitron.report.content import Depth, ReportContent
from nemo_minitron.stages import cards, export
from nemo_minitron.stages.report import recipe_of
from nemo_minitron.stages.run_folder import RunFolder
from tests.support import chromium
from tests.support.pages import Page
from tests.unit import report_sample

STYLE = build.style()


def complete() -> ReportContent:
    """The sample with everything a report can show: depth metrics, tasks, speed, a search, digests."""
    draw = np.random.default_rng(1)
    layers = {"lm_loss": draw.uniform(0.01, 3, 30)}
    blocks = {"lm_loss": {length: draw.uniform(0.1, 9, 31 - length) for length in range(2, 30)}}
    found = replace(report_sample.importance(), depth=Depth(layers=layers, blocks=blocks, samples=2))
    plain = report_sample.content()
    metric = {"acc": {"value": 0.5, "standard_error": 0.02, "higher_is_better": True}}
    row = {"items": 500, "num_fewshot": 0, "metric": "acc", "metrics": metric}
    rows = [
        {"name": f"c{index}", "label": "", "params": 9e7 + 1e6 * index, "loss_pruned": 5 - index / 9, "loss_rung1": 4.0}
        for index in range(5)
    ]
    results = {
        **plain.results,
        "search": {"rows": rows, "rungs": 2, "budget": "params", "seconds": 4.0},
        "evaluate": {**plain.results["evaluate"], "tasks": {name: {"toy": row} for name in ("teacher", "distilled")}},
    }
    records = {name: {"digest": "ab" * 32, "ranks": 1} for name in results}
    return report_sample.content(importance=found, results=results, records=records)


@lru_cache
def report_page() -> str:
    return build.html(complete())


@lru_cache
def compared() -> str:
    runs = []
    for name, change in (("first", 1e-4), ("second", 3e-4)):
        settings = {"distill.optimizer.lr": change, "seed": 1234}
        runs.append(Compared(name=name, content=complete(), settings=settings))
    return comparison(runs)


@pytest.fixture(scope="module", params=["report", "comparison"])
def page(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(report_page() if request.param == "report" else compared(), encoding="utf-8")
    return path


def test_nothing_is_loaded_and_everything_has_a_name(page):
    found = Page(page.read_text(encoding="utf-8"))
    assert found.open == []
    assert all(address.startswith("data:") for address in found.addresses)
    assert found.unnamed == []
    assert found.language == "en"
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(found.headings, found.headings[1:], strict=False))
    assert not re.search(r"url\(|@import|<script", page.read_text(encoding="utf-8"))


@pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium here")
def test_a_browser_shows_it_in_the_dark_on_a_phone_and_without_a_network(page, tmp_path):
    with chromium.browser(tmp_path / "profile") as browser:
        for width, dark in ((1280, False), (390, False), (390, True), (320, False)):
            browser.open(page, width=width, dark=dark)
            assert browser.problems() == []
            assert [address for address in browser.requests() if not address.startswith("data:")] == [page.as_uri()]
            assert browser.value("document.documentElement.scrollWidth") == width
            pictures = browser.value("[...document.images].map(one => [one.naturalWidth, one.currentSrc.length])")
            assert pictures
            assert all(size > 0 for size, _ in pictures)
            background = browser.value("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(15, 23, 42)" if dark else "rgb(255, 255, 255)")
        browser.open(page, width=800, dark=True, media="print")
        assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        font = browser.value("getComputedStyle(document.body).fontFamily")
        assert "sans-serif" in font


def test_a_phone_is_given_the_narrow_pictures(page):
    text = page.read_text(encoding="utf-8")
    assert text.count('<source media="(max-width: 34rem)"') == text.count("<img ") > 0


# -- contrast: WCAG 2.1, relative luminance of sRGB ------------------------------------------------------------------


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_black_on_white_is_21_to_1():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_can_be_read(theme):
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", STYLE.split("@media screen")[theme]))
    for ground in ("paper", "wash"):
        for text in set(colours) - {"paper", "wash", "line"}:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def test_lines_and_bars_can_be_told_from_the_page():
    light = {colour: colour for colour in drawing.DARK}
    for colours in (light, drawing.DARK):
        paper = colours[drawing.PAPER]
        for name, colour in colours.items():
            if name not in (drawing.PAPER, drawing.GRID):
                assert contrast(colour, paper) >= 3, colour


# -- figures ---------------------------------------------------------------------------------------------------------


def test_no_legend_lies_over_axes(monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    build.html(complete())
    checked = 0
    for figure in drawn:
        figure.draw_without_rendering()
        assert not any(axes.get_legend() for axes in figure.axes)
        parts = [figure, *figure.subfigs]
        for legend in (legend for part in parts for legend in part.legends):
            box = legend.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.width
            for axes in figure.axes:
                assert not box.overlaps(axes.get_tightbbox())
            checked += 1
    assert checked >= 14  # architecture, two of distillation, search, layers, left out, curves, channels: each twice


def test_the_untrained_line_is_the_logarithm_of_the_vocabulary():
    text = build.readme(complete())
    assert "| random init, ln(49,152) |  | 10.8027 |" in text  # ln 49152 = 14 ln 2 + ln 3
    assert "random init, ln(49,152)" in curves.distillation(report_sample.metrics(), 49152).wide


def test_known_colours_follow_the_theme_and_no_other_is_drawn():
    pictures = re.findall(r"svg\+xml;base64,([A-Za-z0-9+/=]+)", report_page())
    assert len(pictures) >= 14  # seven figures, each for a wide page and a phone
    for encoded in pictures:
        svg = base64.b64decode(encoded).decode()
        body = svg.partition("</style>")[2]
        assert "prefers-color-scheme:dark" in svg
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", body)) == set()


def test_the_headline_says_what_people_ask_first():
    found = {row["label"]: row["value"] for row in tables.headline(complete())}
    words = " ".join(f"{value} {label}" for label, value in found.items())
    assert "134.5M → 97.4M" in words
    assert "269 MB → 195 MB memory" in words  # 2 bytes each
    assert "100% of the teacher's task scores kept" in words
    # 30 layers of 576 * (3 * 1536 + 2 * 9 * 64 + 2 * 3 * 64) and the output layer, against 26 narrower ones
    before = 30 * 576 * (3 * 1536 + 2 * 9 * 64 + 2 * 3 * 64) + 49152 * 576
    after = 26 * 576 * (3 * 1152 + 2 * 6 * 64 + 2 * 3 * 64) + 49152 * 576
    assert f"{after / before:.2f} x multiplications" in words


def test_a_comparison_names_what_differs():
    page = Page(compared())
    words = " ".join(page.words)
    assert "Where the recipes differ" in words
    assert "distill.optimizer.lr 0.0001 0.0003" in re.sub(r"\s+", " ", words)
    assert "seed 1234 1234" not in re.sub(r"\s+", " ", words)
    assert "1.42 x" in words
    assert "The teacher's differ" not in words


def test_teachers_that_were_measured_on_other_text_are_pointed_out():
    first, second = complete(), complete()
    second.results["evaluate"]["perplexity"]["teacher"] *= 1.02
    runs = [Compared(name=name, content=one, settings={}) for name, one in (("a", first), ("b", second))]
    assert "The teacher's differ" in " ".join(Page(comparison(runs)).words)


# -- run folders -----------------------------------------------------------------------------------------------------


def run_folder(path: Path, *, lr: float = 1e-4) -> Path:
    """A run of the tiny recipe as far as its pruned student, with the results that the sample has."""
    sample = complete()
    config = load_recipe(find("tiny/tiny_cpu"), [f"distill.optimizer.lr={lr}", "model.source=x", "data.sources=[y]"])
    results = {
        **{name: row for name, row in sample.results.items() if name != "search"},
        "import": {"spec": sample.teacher.to_dict(), "seconds": 3.2},
        "prune": {
            "spec": sample.student.to_dict(),
            "parameters": 97_351_488,
            "teacher_parameters": 134_515_008,
            "seconds": 2.0,
        },
    }
    path.mkdir()
    (path / "config.resolved.yaml").write_text(to_yaml(config))
    (path / "manifest.json").write_text(json.dumps(sample.manifest))
    for name, result in results.items():
        folder = path / "stages" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "DONE").write_text(json.dumps({"digest": "cd" * 32, "upstream": {}, "ranks": 1}))
    (path / "stages/distill/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample.metrics))
    return path


def command(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output


def test_several_runs_are_compared_on_one_page(tmp_path):
    runs = [run_folder(tmp_path / name, lr=lr) for name, lr in (("slow", 1e-4), ("quick", 3e-4))]
    out = tmp_path / "both.html"
    assert str(out) in command(*runs, "--out", out)
    page = Page(out.read_text(encoding="utf-8"))
    words = re.sub(r"\s+", " ", " ".join(page.words))
    assert "slow, quick" in words
    assert "distill.optimizer.lr 0.0001 0.0003" in words
    assert page.unnamed == []
    assert "named twice" in command(runs[0], runs[0], status=2)


def test_one_run_s_page_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.stages.report._importance", lambda folder, config: report_sample.importance())
    run = run_folder(tmp_path / "run")
    command(run)
    assert json.loads((run / "summary.json").read_text())["params"]["student"] == 97_351_488
    for name in ("report.html", "README.md"):
        assert "cd" * 32 in (run / name).read_text()


def test_what_is_older_than_what_it_was_made_from_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.stages.report._importance", lambda folder, config: report_sample.importance())
    run = run_folder(tmp_path / "run")
    assert "perplexity" in closing.summary(RunFolder(run), recipe_of(RunFolder(run)))
    done = run / "stages/evaluate/DONE"
    done.write_text(json.dumps({"digest": "ab" * 32, "upstream": {"distill": "ee" * 32}}))
    command(run)
    assert "distilled" not in json.loads((run / "summary.json").read_text())["perplexity"]
    # Nor does the card of a model that is exported beside it speak of them.
    config = recipe_of(RunFolder(run))
    assert "perplexity" not in closing.summary(RunFolder(run), config)
    making = cards.making(config, export._content(SimpleNamespace(run=RunFolder(run), config=config)))
    assert making.evaluation == {}
    assert making.tokens == 204_800
    (run / "stages/prune/DONE").write_text(json.dumps({"digest": "ab" * 32, "upstream": {"score": "ee" * 32}}))
    making = cards.making(config, export._content(SimpleNamespace(run=RunFolder(run), config=config)))
    assert (making.content, making.evaluation, making.tokens, making.objective) == (None, {}, None, "")
    assert "stage prune is older than a stage that it was made from" in command(run, status=2)


def test_options_of_recipes_do_nothing_in_silence_for_runs(tmp_path):
    run = run_folder(tmp_path / "run")
    assert "go with a recipe" in command(run, "--dry-run", status=2)
    assert not (run / "report.html").exists()
    assert "--out goes with run folders" in command("tiny_cpu", "--out", tmp_path / "x.html", status=2)


def test_recipes_are_compared_to_their_last_letter(tmp_path):
    content = complete()
    runs = [Compared(name=end, content=content, settings={"data.sources": "a" * 500 + end}) for end in "xy"]
    assert "Where the recipes differ" in " ".join(Page(comparison(runs)).words)


def test_what_is_no_run_is_refused(tmp_path):
    run = run_folder(tmp_path / "run")
    assert "no run folder" in command(run, tmp_path / "elsewhere", status=2)
    (run / "stages/prune/DONE").unlink()
    assert "stage prune is not finished" in command(run, "--out", tmp_path / "x.html", status=2)
