"""Metrics files, TensorBoard, throughput and progress on a real Lightning loop of a one-weight model."""

import io
import json
import time

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.callbacks.metrics import MetricsLogger
from nemo_minitron.callbacks.metrics_file import MetricsFile
from nemo_minitron.callbacks.progress import ProgressDisplay
from nemo_minitron.callbacks.reporter import Reporter, clock, compact, duration
from nemo_minitron.callbacks.throughput import Throughput
from nemo_minitron.json_lines import read_rows

TOKENS = 10


class OneWeight(LightningModule):
    """Manual optimisation, metrics as the models log them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = (self.weight - 1) ** 2
        self.manual_backward(loss)
        optimizer.step()
        time.sleep(0.01)
        self.log_dict({"train/loss": loss.detach(), "train/lr": torch.tensor(0.1)}, batch_size=1)

    def validation_step(self, batch, batch_idx):
        self.log("val/kl", torch.tensor(0.5), batch_size=1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(100))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(range(3))


def fit(tmp_path, reporter, *, steps, log_every=1, ckpt_path=None, callbacks=()):
    throughput = Throughput(TOKENS)
    out = tmp_path / "stage"
    out.mkdir(exist_ok=True)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_steps=steps,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        callbacks=[
            throughput,
            MetricsLogger(
                [tmp_path / "metrics.jsonl", out / "metrics.jsonl"],
                tensorboard=tmp_path / "tensorboard",
                tokens_per_step=TOKENS,
                every_n_steps=log_every,
                last_step=steps,
                labels={"stage": "distill"},
                reporter=reporter,
            ),
            ProgressDisplay(reporter, "distill"),
            *callbacks,
        ],
    )
    trainer.fit(OneWeight(), ckpt_path=ckpt_path)
    return trainer, throughput


@pytest.fixture
def log():
    return io.StringIO()


def test_rows_have_step_tokens_and_what_the_model_logged(tmp_path, log):
    fit(tmp_path, Reporter(stream=log), steps=8, log_every=3)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows == read_rows(tmp_path / "stage" / "metrics.jsonl")
    training = [row for row in rows if "train/loss" in row]
    assert [(row["step"], row["tokens"]) for row in training] == [(3, 30), (6, 60), (8, 80)]
    # (w - 1)^2 under gradient descent with rate 0.1: w_k = 1 - 0.8^k, so the loss before step k is 0.8^(2(k-1))
    for row in training:
        assert row["train/loss"] == pytest.approx(0.8 ** (2 * (row["step"] - 1)), rel=1e-5)
        assert row["stage"] == "distill"
        assert 0 < row["train/tokens_per_second"] < TOKENS / 0.01
    assert [(row["step"], row["val/kl"]) for row in rows if "val/kl" in row] == [(4, 0.5), (8, 0.5)]


def test_tensorboard_gets_the_same_numbers(tmp_path, log):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, Reporter(stream=log), steps=4)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    values = {event.step: event.value for event in board.Scalars("train/loss")}
    assert values == pytest.approx(
        {row["step"]: row["train/loss"] for row in read_rows(tmp_path / "metrics.jsonl") if "train/loss" in row}
    )


def test_a_resumed_run_writes_each_step_once(tmp_path, log):
    trainer, first = fit(tmp_path, Reporter(stream=log), steps=4)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    for step in (5, 6):  # rows written after the checkpoint, then a crash in the middle of one
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": "distill", "step": step, "train/loss": -1.0}) + "\n")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "distill", "st')
    trainer, second = fit(tmp_path, Reporter(stream=log), steps=8, ckpt_path=tmp_path / "at4.ckpt")
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(row["train/loss"] >= 0 for row in rows if "train/loss" in row)
    assert second.steps == first.steps + 3  # 3 of 4, then 3 of 4: the first step of each attempt is not counted


def test_a_training_that_ends_early_has_a_row_of_its_last_step(tmp_path, log):
    class EndAtFive(Callback):
        def on_train_batch_end(self, trainer, *unused):
            trainer.should_stop = trainer.global_step == 5

    fit(tmp_path, Reporter(stream=log), steps=8, log_every=3, callbacks=[EndAtFive()])
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [3, 5]
    assert rows[-1]["train/loss"] == pytest.approx(0.8**8, rel=1e-5)


def test_rows_of_other_stages_and_earlier_steps_stay(tmp_path):
    """A step is validated after it was done: what a first row does not come after is done again."""
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"stage": "correct", "step": 9, "train/loss": 1.0},
        {"stage": "distill", "step": 4, "train/loss": 2.0},
        {"stage": "distill", "step": 4, "val/kl": 1.0},
        {"stage": "distill", "step": 5, "train/loss": 2.0},
        {"stage": "distill", "step": 5, "val/kl": 1.0},
    ]

    def written(first):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        MetricsFile(path).write(first)
        return read_rows(path)

    for index in (1, 2, 3, 4):
        first = {**rows[index], "again": True}
        assert written(first) == [*rows[:index], first]


def test_a_resumed_training_keeps_nothing_of_the_steps_it_does_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for stage, step in (("correct", 9), ("distill", 4), ("distill", 5), ("distill", 7)):
        with path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, "train/loss": 1.0}) + "\n")
    file = MetricsFile(path)
    file.resume("distill", 4)
    file.write({"stage": "distill", "step": 8, "train/loss": 1.0})  # a row every eight steps now
    file.resume("distill", 0)  # says nothing about what this process has written
    assert [(row["stage"], row["step"]) for row in read_rows(path)] == [("correct", 9), ("distill", 4), ("distill", 8)]


def test_throughput_is_tokens_over_measured_time(tmp_path, log):
    _, throughput = fit(tmp_path, Reporter(stream=log), steps=5)
    assert throughput.steps == 4
    assert throughput.seconds >= 4 * 0.01
    assert throughput.summary()["tokens_per_second"] == pytest.approx(4 * TOKENS / throughput.seconds, rel=1e-3)
    assert Throughput(TOKENS).summary() == {"tokens_per_second": None, "step_seconds": None}


def test_a_log_gets_few_plain_lines(tmp_path, log, monkeypatch):
    fit(tmp_path, Reporter(stream=log), steps=8)
    lines = [line for line in log.getvalue().splitlines() if line.startswith("distill")]
    assert len(lines) == 2  # the first step and the last; others within five seconds are left out
    assert "\x1b" not in log.getvalue()
    shown = "distill 8/8 steps · loss 0.044 · held-out KL 0.500 at step 4 · lr 1.0e-01 · "  # 0.8^14
    assert lines[-1].startswith(shown)
    assert lines[-1].endswith("tokens/s")


def test_a_terminal_gets_a_bar(tmp_path, log, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fit(tmp_path, Reporter(stream=log, terminal=True), steps=8)
    assert "8/8 steps" in log.getvalue()
    assert "…" not in log.getvalue(), "what does not fit into a line is in the next one"
    assert "\x1b" in log.getvalue()


def test_ranks_above_zero_write_and_say_nothing(tmp_path, log):
    fit(tmp_path, Reporter(stream=log, silent=True), steps=4)
    assert log.getvalue() == ""
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "tensorboard").exists()


def test_validation_alone_is_shown(log):
    reporter = Reporter(stream=log)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=ProgressDisplay(reporter, "score")
    )
    trainer.validate(OneWeight(), verbose=False)
    assert "score 3/3 batches" in log.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(5, "00:05"), (125, "02:05"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.25, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(431, "431"), (3120, "3.1k"), (1_230_000, "1.2M")])
def test_compact(number, text):
    assert compact(number) == text
