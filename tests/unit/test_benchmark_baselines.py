"""The comparison with plain ways to distill: its arithmetic, and that the plain loop does what it says."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from scipy.special import log_softmax
from transformers import Trainer, TrainingArguments

from benchmarks.baselines import compare, plain_kd
from benchmarks.baselines.lessons import SAMPLES, STUDENT, TEACHER, Lesson, Record, divergence
from tests.tiny import write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lesson")
    write_llama(path / TEACHER, seed=1, trained_steps=30)
    write_llama(path / STUDENT, seed=2)
    draw = torch.Generator().manual_seed(0)
    samples = {
        name: torch.randint(0, 256, (count, 17), generator=draw) for name, count in (("train", 12), ("heldout", 2))
    }
    save_file(samples, path / SAMPLES)
    return path


def test_a_point_between_two_validations_lies_on_the_line_between_them():
    curve = [{"seconds": 0.0, "kl": 1.0}, {"seconds": 10.0, "kl": 0.6}, {"seconds": 20.0, "kl": 0.4}]
    assert compare.seconds_to(curve, 0.5) == pytest.approx(15)
    assert compare.seconds_to(curve, 0.4) == pytest.approx(20)
    assert compare.seconds_to(curve, 0.3) is None


def test_the_table_counts_who_never_arrived():
    def run(seconds: float, kl: float) -> list[dict[str, float]]:
        first = {"tokens": 0, "seconds": 0.0, "kl": 1.0, "ce": 4.0}
        return [first, {"tokens": 1000, "seconds": seconds, "kl": kl, "ce": 3.0}]

    text = compare.table({"ours": [run(50, 0.5), run(60, 0.9)], "plain": [run(100, 0.5), run(120, 0.5)]})
    ours, plain = text.splitlines()[2:]
    assert "| 0.50 (1 never) |" in ours
    assert "55.0 (50.0 to 60.0)" in ours
    assert plain.endswith("| 1.00 (1.00 to 1.00) |")


def test_the_rate_rises_to_its_peak_and_falls_to_zero(tmp_path):
    lesson = Lesson(folder=tmp_path, steps=20, batch=1, lr=1.0, warmup=0.1)
    rates = [lesson.rate(step) for step in range(20)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 17 / 18])
    assert rates[-1] == 0


def test_divergence_is_that_of_float64_arithmetic(folder):
    lesson = Lesson(folder=folder, steps=12, batch=1, lr=0.0)
    teacher, student, heldout = lesson.model(TEACHER), lesson.model(STUDENT).eval(), lesson.samples("heldout")
    kl, ce = divergence(student, teacher, heldout)
    expected = [0.0, 0.0]
    with torch.no_grad():
        for sample in heldout:
            logp, logq = (
                log_softmax(model(sample[None, :-1]).logits[0].double().numpy(), axis=-1)
                for model in (teacher, student)
            )
            expected[0] += float((math.e**logp * (logp - logq)).sum()) / 32
            expected[1] -= sum(float(logq[place, label]) for place, label in enumerate(sample[1:].tolist())) / 32
    assert (kl, ce) == pytest.approx(tuple(expected), rel=1e-5)


def test_the_plain_loop_learns_and_writes_its_curve(folder, tmp_path, monkeypatch):
    out = tmp_path / "plain.json"
    words = ["plain_kd", "--folder", folder, "--steps", 6, "--batch", 2, "--lr", 1e-2, "--validations", 2, "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    plain_kd.main()
    curve = json.loads(out.read_text())["curve"]
    assert [point["tokens"] for point in curve] == [0, 3 * 32, 6 * 32]
    assert curve[0]["seconds"] == 0 < curve[1]["seconds"] < curve[2]["seconds"]
    assert curve[-1]["kl"] < curve[0]["kl"]


def by_trainer(lesson, student, record):
    """The loop's loss in transformers' own Trainer, told what the others' are told."""

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return plain_kd.loss(lesson, model, record.teacher, inputs["input_ids"])

    trainer = OwnLoss(
        model=student,
        args=plain_kd.arguments(lesson, TrainingArguments),
        data_collator=plain_kd.stacked,
        train_dataset=plain_kd.Rows(lesson.samples("train")),
        callbacks=[plain_kd.Watch(lesson, record)],
    )
    plain_kd.as_told(trainer, lesson)
    trainer.train()


def by_package(name):
    def train(*given):
        pytest.importorskip(name, reason=f"{name} is not installed; benchmarks/baselines/compare.py says how")
        plain_kd.TRAINERS[name](*given)

    return train


@pytest.mark.parametrize(
    "train", [by_trainer, by_package("trl"), by_package("modelopt")], ids=["own", "trl", "modelopt"]
)
def test_the_trainers_of_others_take_the_same_steps_as_the_plain_loop(folder, train):
    """Same samples, rates, weight decay and clipping: what differs between them in the comparison is time."""
    curves = []
    for teach in (plain_kd.plain, train):
        torch.manual_seed(0)
        lesson = Lesson(folder=folder, steps=6, batch=2, lr=1e-2, validations=6)
        record = Record(teacher=lesson.model(TEACHER), heldout=lesson.samples("heldout"), tokens_per_step=32)
        teach(lesson, lesson.model(STUDENT), record)
        curves.append([point["kl"] for point in record.curve])
    assert len(curves[0]) == 6
    assert max(curves[0]) > 1.1 * min(curves[0])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
