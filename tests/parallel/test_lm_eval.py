"""The LM-Evaluation-Harness on our models says, item by item, what its own `hf` backend says."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.parallel import ParallelConfig
from tests.parallel.lm_eval_jobs import run_by_name, run_tasks_at, samples_of
from tests.ranks import run_on_ranks
from tests.tiny import WORDS, sentences, write_llama

pytest.importorskip("lm_eval")

TASKS = ["toy_choice", "toy_letters", "toy_rolling", "toy_generate"]
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "pp2 vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "tp2 dp2": (4, ParallelConfig(tensor=2)),
}
CONTEXT = 48
"""Tokens that the model reads: some items are longer."""


def items() -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for number in range(24):
        choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(3)]
        question = sentences(number, rng.randint(1, 4)) + (" " if number % 3 == 0 else "")
        rows.append({"question": question, "choices": choices, "letters": ["A", "B", "C"], "label": number % 3})
    return rows


YAML = {
    "toy_choice": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"},
    "toy_letters": {"output_type": "multiple_choice", "doc_to_choice": "letters", "doc_to_target": "label"},
    "toy_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": name} for name in ("byte_perplexity", "bits_per_byte")],
    },
    "toy_generate": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["of the", "."], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Task files whose data lie beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = items()
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in YAML.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
            "test_split": "test",
            "doc_to_text": "question",
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **settings}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_llama(folder, vocab_size=251, max_position_embeddings=CONTEXT, trained_steps=30)
    return folder


@pytest.fixture(scope="module")
def expected(model, tasks) -> dict[str, Any]:
    """What the harness's own backend answers to every item."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = HFLM(AutoModelForCausalLM.from_pretrained(model), tokenizer=AutoTokenizer.from_pretrained(model))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(reference, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


def numbers(answers: Any) -> list[float]:
    """Log-likelihoods of an item's answers."""
    return [float(one[0] if isinstance(one, (list, tuple)) else one) for one in answers]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_answers_as_the_hf_backend_does(layout, model, tasks, expected, tmp_path):
    world_size, parallel = LAYOUTS[layout]
    found = run_on_ranks(world_size, run_tasks_at, model, parallel, TASKS, tasks, tmp_path)
    assert len({json.dumps(rank["results"]) for rank in found}) == 1, "all ranks hold the results"
    assert [rank["asked"] for rank in found[1:]] == [0] * (world_size - 1), "rank 0 alone runs the harness"
    for task in TASKS:
        mine, theirs = samples_of(tmp_path, task), expected["samples"][task]
        assert [row["item"] for row in mine] == [row["doc_id"] for row in theirs]
        for one, other in zip(mine, theirs, strict=True):
            answers = other["filtered_resps"]
            if task == "toy_generate":
                assert one["answers"] == answers
                continue
            assert numbers(one["answers"]) == pytest.approx(numbers(answers), abs=1e-3)
            if task != "toy_rolling":
                assert [answer[1] for answer in one["answers"]] == [answer[1] for answer in answers]
        for metric, row in found[0]["results"][task]["metrics"].items():
            assert row["value"] == pytest.approx(expected["results"][task][f"{metric},none"], rel=1e-4)
    texts = [row["answers"][0] for row in samples_of(tmp_path, "toy_generate")]
    assert len(set(texts)) > 5, "texts worth comparing"


@pytest.mark.slow
def test_what_was_answered_is_not_asked_again(model, tasks, tmp_path):
    [first] = run_on_ranks(1, run_tasks_at, model, ParallelConfig(), TASKS, tasks, tmp_path)
    answers = tmp_path / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    kept = len(lines) // 2
    answers.write_text("".join(lines[:kept]) + lines[kept][:9])  # as a kill leaves it
    [second] = run_on_ranks(1, run_tasks_at, model, ParallelConfig(), TASKS, tasks, tmp_path)
    for task, row in first["results"].items():
        for metric, found in row["metrics"].items():  # in other batches, so rounded otherwise
            assert second["results"][task]["metrics"][metric]["value"] == pytest.approx(found["value"], rel=1e-5)
    assert 0 < second["asked"] <= len(lines) - kept + 1 < first["asked"]
    keys = [json.loads(line)[0] for line in answers.read_text().splitlines()]
    assert sorted(keys) == sorted(json.loads(line)[0] for line in lines)


@pytest.mark.slow
def test_the_harness_finds_it_by_name(model, tasks, expected):
    first, _ = run_on_ranks(2, run_by_name, model, tasks, "toy_choice")
    assert first["acc,none"] == pytest.approx(expected["results"]["toy_choice"]["acc,none"])
