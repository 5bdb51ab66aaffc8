"""Teacher correction and tuning on conversations as parts of a complete run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.megatron.chat_files import ConversationDataset
from tests import chain_jobs
from tests.ranks import RankError, run_on_ranks
from tests.tiny import WORDS, write_corpus, write_llama

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TUNE = {
    "tokens": 12 * 8 * 32,
    "batch": {"sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 8},
    "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2},
    "validate_every": 6,
    "validation_samples": 100,
    "checkpoint_every": 6,
    "validation_fraction": 0.1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=100)
    (folder / "hf/chat_template.jinja").write_text(TEMPLATE)
    write_corpus(folder / "corpus")
    pairs = [(f"the {word} of the {other}", f"was a {word}.") for word in WORDS for other in WORDS[:3]]
    talks = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in pairs
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, dict]:
    run = tmp_path_factory.mktemp("tuned") / "run"
    correct = {"tokens": 4 * 8 * 64, "validate_every": 2, "checkpoint_every": 2, "validation_samples": 8}
    tune = TUNE | {"sources": [str(inputs / "chat.jsonl")], "kd_weight": 0.1}
    return run, run_on_ranks(1, run_all, run, inputs, correct, tune)[0]


def run_all(run: Path, inputs: Path, correct: dict, tune: dict) -> dict:
    return chain_jobs.run_to(run, inputs, correct=correct, tune=tune)


def test_the_stages_of_the_recipe_are_there_in_order(finished):
    _, results = finished
    order = [
        "import",
        "data",
        "tokenize_chat",
        "correct",
        "score",
        "prune",
        "distill",
        "tune",
        "evaluate",
        "export",
        "report",
    ]
    assert list(results) == order


def test_answers_are_learned_and_text_is_measured(finished):
    run, results = finished
    history = results["tune"]["history"]
    assert [row["step"] for row in history] == [0, 6, 12]
    assert history[-1]["ce"] < 0.8 * history[0]["ce"]
    assert list(results["evaluate"]["perplexity"]) == ["teacher", "pruned", "distilled", "tuned"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["perplexity"]["tuned"] > 1
    assert "Teacher correction and tuning" in (run / "report.html").read_text()


def test_loss_is_that_of_transformers_on_the_answers(finished, tmp_path):
    """The first validation is of the distilled student: mean cross-entropy over the answers' tokens alone."""
    run, results = finished
    write_hf(open_checkpoint(run / "stages/distill/student"), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    total, count = 0.0, 0
    conversations = ConversationDataset(run / "stages/tokenize_chat", "validation")
    for item in (conversations[index] for index in range(len(conversations))):
        with torch.no_grad():
            logits = model(item["tokens"][None]).logits[0].double()
        nats = torch.nn.functional.cross_entropy(logits, item["labels"], reduction="none")
        total += float((nats * item["loss_mask"]).sum())
        count += int(item["loss_mask"].sum())
    assert results["tune"]["history"][0]["ce"] == pytest.approx(total / count, rel=1e-4)


def test_the_tuned_student_is_what_is_exported(finished):
    run, _ = finished
    exported = open_checkpoint(run / "stages/export/tiny_hf")
    tuned, distilled = chain_jobs.weights(run, "tune"), chain_jobs.weights(run, "distill")
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    torch.testing.assert_close(exported.get(name), tuned[name])
    assert not torch.equal(tuned[name], distilled[name])
    assert AutoTokenizer.from_pretrained(run / "stages/export/tiny_hf").chat_template == TEMPLATE


def test_a_faulty_conversation_ends_the_run_before_any_model_is_touched(inputs, tmp_path):
    faulty = tmp_path / "faulty.jsonl"
    faulty.write_text('{"prompt": "a", "answer": "b"}\n{"messages": [{"content": "hello"}]}\n')
    with pytest.raises(RankError, match=r"faulty\.jsonl:2: message 1 needs a role"):
        run_on_ranks(1, run_all, tmp_path / "run", inputs, None, TUNE | {"sources": [str(faulty)]})
    assert not (tmp_path / "run/stages/score").exists()
