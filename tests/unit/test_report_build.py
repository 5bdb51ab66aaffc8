"""The report: what it must show, that it is one file, and that it survives odd content."""

import base64
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from nemo_minitron.arch.axes import Axis
from nemo_minitron.report import build, curves, figures
from nemo_minitron.report.content import summary
from tests.support.pages import Page
from tests.unit import report_sample


@pytest.fixture(scope="module")
def html() -> str:
    return build.html(report_sample.content())


def test_everything_is_inside_one_wellformed_file(html):
    page = Page(html)
    assert page.open == []
    pictures = [address for address in page.addresses if address != "data:,"]  # the page's icon: none
    assert len(pictures) == 2 * 6  # each for a wide page and for a phone
    assert all(address.startswith("data:image/svg+xml;base64,") for address in pictures)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    for address in pictures:
        picture = base64.b64decode(address.partition(",")[2])
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_numbers_are_there(html):
    words = " ".join(Page(html).words)
    for expected in (
        "134,515,008",  # the model's published size
        "97,351,488",  # 26 layers of (576*(6+6)*64 + 6*64*576 + 3*576*1152 + 2*576) + 49152*576 + 576
        "dropped",
        "3, 5, 14, 17",
        "3.7500",
        f"{math.exp(3.75):.2f}",
        f"{math.exp(0.35):.2f} x",
        "6 min 50 s",
        "4.40 GB",
        "512 tokens/s",
        "nemo-minitron demo",
        "0123abcd",
        "name: small seed: 1234",
    ):
        assert expected in words or expected in html, expected


def test_the_students_size_is_what_the_shapes_say():
    attention = 576 * (6 + 2 * 3) * 64 + 6 * 64 * 576
    layer = attention + 3 * 576 * 1152 + 2 * 576
    assert report_sample.content().parameters["student"] == 26 * layer + 49152 * 576 + 576


def test_samples_are_escaped_and_the_prompt_is_shown_once(html):
    assert "&lt;b&gt;of&lt;/b&gt; &amp; the" in html
    assert html.count("The history of the city begins") == 3


def test_summary_has_what_programs_look_for():
    found = json.loads(json.dumps(summary(report_sample.content())))
    assert found["params"] == {"teacher": 134_515_008, "student": 97_351_488}
    assert found["perplexity"] == pytest.approx(
        {"teacher": math.exp(3.4), "pruned": math.exp(6.1), "distilled": math.exp(3.75)}
    )
    assert found["tokens"] == 204_800
    assert found["tokens_per_second"] == 512.3
    assert found["seconds"]["distill"] == 410.2
    assert found["seconds_total"] == pytest.approx(541.2)
    assert found["dropped_layers"] == [3, 5, 14, 17]
    assert found["perplexity_ratio"]["distilled"] == pytest.approx(math.exp(0.35))


def test_readme_is_a_markdown_table_with_a_row_a_model():
    text = build.readme(report_sample.content())
    rows = [line for line in text.splitlines() if line.startswith(("| teacher", "| pruned", "| distilled"))]
    rows = [row for row in rows if "M |" in row]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        ["teacher", "134.5M", "3.4000", f"{math.exp(3.4):.2f}", "1.00 x"],
        ["pruned", "97.4M", "6.1000", f"{math.exp(6.1):.2f}", f"{math.exp(2.7):.2f} x"],
        ["distilled", "97.4M", "3.7500", f"{math.exp(3.75):.2f}", f"{math.exp(0.35):.2f} x"],
    ]
    assert 'folder = "stages/export/small_hf"' in text
    assert "&#" not in text
    assert "&amp;" not in text
    assert "None" not in text


def test_a_run_that_has_not_come_far_still_has_a_report():
    content = report_sample.content(
        results={"import": {"seconds": 1.0}}, importance=None, metrics=[], manifest={"version": "0"}
    )
    page = Page(build.html(content))
    assert page.open == []
    assert page.addresses == ["data:,"]
    assert summary(content)["tokens"] is None
    assert "None" not in " ".join(page.words)
    assert "small" in build.readme(content)


def test_the_same_content_gives_the_same_bytes():
    first = build.html(report_sample.content())
    assert first == build.html(report_sample.content())


def test_dropped_layers_have_their_own_colour():
    svg = figures.layer_importance(report_sample.importance()).wide
    bars = len(re.findall(rf'style="fill: {figures.CUT}"', svg))
    assert bars == len(report_sample.DROPPED) + 2  # the layers, an invisible one for the legend, and the legend's patch


def test_dead_units_and_a_model_that_is_kept_whole_can_be_drawn():
    whole = report_sample.importance()
    layers = range(30)
    values = {
        **vars(whole),
        "units": {**whole.units, Axis.FFN: tuple(np.zeros(1536) for _ in layers)},
        "hidden": np.zeros(576),
        "block_influence": np.zeros(30),
        "kept": {layer: {Axis.FFN: tuple(range(1536)), Axis.HEAD: tuple(range(9))} for layer in layers},
    }
    content = report_sample.content(importance=type(whole)(**values), student=report_sample.TEACHER)
    assert Page(build.html(content)).open == []


def test_metrics_without_validation_can_be_drawn():
    rows = [row for row in report_sample.metrics() if "train/kl" in row]
    ElementTree.fromstring(curves.distillation(rows, 49152).narrow)
