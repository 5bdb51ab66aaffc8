"""`nemo-minitron evaluate --tasks` on a tiny model: under a pipeline, killed on the way, and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import WORDS, sentences, write_corpus, write_llama

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

EXTRA = [
    "evaluate.stride=16",
    "evaluate.max_tokens=512",
    "evaluate.speed={prompt_tokens: 16, new_tokens: 4, rounds: 2}",
]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    rows = [
        {"question": sentences(seed, 1), "choices": [WORDS[seed], WORDS[seed + 1]], "label": seed % 2}
        for seed in range(20)
    ]
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        **{"task": "toy", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
        "dataset_kwargs": {"data_files": {"test": str(tasks / "items.jsonl")}},
        **{"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "label"},
    }
    (tasks / "toy.yaml").write_text(json.dumps(task))
    model, texts = f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]"
    return [model, texts, "distill.tokens=2048", f"evaluate.include_path=[{tasks}]"]


def run(run_dir: Path, *arguments: str, verb: str = "evaluate", status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_minitron", verb, "tiny/tiny_cpu", *arguments, "--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_tasks_speed_and_documents_reach_every_file(given, tmp_path):
    done = run(tmp_path, *given, *EXTRA, "--tasks", "toy", "parallel.pipeline=2")
    result = json.loads((tmp_path / "stages/evaluate/result.json").read_text())
    assert list(result["tasks"]) == ["teacher", "pruned", "distilled"]
    assert all(row["toy"]["items"] == 20 for row in result["tasks"].values())
    assert result["documents"] > 1
    assert result["bytes"] > result["tokens"] > 400
    assert set(result["speed"]["ratio"]) == {"distilled"}
    for name in result["tasks"]:
        items = (tmp_path / f"stages/evaluate/tasks/{name}/toy.jsonl").read_text().splitlines()
        right = [json.loads(line)["acc"] for line in items]
        assert result["tasks"][name]["toy"]["metrics"]["acc"]["value"] == pytest.approx(sum(right) / 20)
    assert "toy" in done.stdout
    assert "first token" in done.stdout
    run(tmp_path, *given, *EXTRA, "evaluate.tasks=toy", "parallel.pipeline=2", verb="run")
    refused = run(tmp_path, *given, *EXTRA, "--tasks", "toi", "parallel.pipeline=2", "--redo", status=2)
    assert "toi: no such task" in refused.stderr
    assert json.loads((tmp_path / "stages/evaluate/result.json").read_text()) == result
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["task_score_kept"]["distilled"]["toy"] > 0
    card = (tmp_path / "stages/export/tiny_hf/README.md").read_text()
    for text in ((tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text(), card):
        assert "toy" in text
        assert "2 rounds" in text
    result["perplexity"]["distilled"] = 345.61
    (tmp_path / "stages/evaluate/result.json").write_text(json.dumps(result))
    page = tmp_path / "a new folder" / "page.html"
    for words in ([], ["--out", str(page)]):
        subprocess.run([sys.executable, "-m", "nemo_minitron", "report", str(tmp_path), *words], check=True)
    card = (tmp_path / "stages/export/tiny_hf/README.md").read_text()
    for text in (page.read_text(), (tmp_path / "README.md").read_text(), card):
        assert "345.61" in text, "an evaluation that is newer than the export is in its card"
