"""Every number that a distillation logs, computed again from the weights and the batch of its step.

The reference is `transformers` in float64, autograd's gradients and the schedule's closed form. The training is the
real stage: it logs every step, skips one, is killed, goes on from a step that it validates first, is killed again, and
goes on between two validations with a row every other step.
"""

import math
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.json_lines import read_rows
from tests import chain_jobs
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow

STEPS, WARMUP, PEAK, LOWEST = 9, 2, 2e-3, 2e-4
POISONED = 3
KILLED = (5, 7)
"""The first two attempts end after these steps, and what follows goes on from steps 4 and 6."""
LM_WEIGHT = 0.5
TOKENS = 8 * 64
WATCHED = 3
"""Steps 1, 4 and 7 also measure what validations do."""
SLOW = {4: 0.3, 6: 0.3}
"""Seconds that are added to a step."""


class StoppedError(Exception):
    """As if the process were killed: nothing is tidied up."""


def train(run: Path, inputs: Path, log_every: int, killed: int | None = None) -> dict[str, Any]:
    """One attempt, which ends after step `killed`; what each step had."""
    seen: dict[str, Any] = {"train": {}, "val": {}, "lines": [], "logger": []}
    settings = {
        "tokens": STEPS * TOKENS,
        "lm_weight": LM_WEIGHT,
        "optimizer": {"lr": PEAK, "min_lr": LOWEST, "warmup_steps": WARMUP, "schedule": "cosine"},
        "validate_every": 4,
        "checkpoint_every": 2,
    }
    with suppress(StoppedError):
        chain_jobs.run_to(run, inputs, "distill", before=lambda: _watch(seen, log_every, killed), distill=settings)
    return seen


class NoteLogger(Logger):
    """One of Lightning's loggers, as NeMo's `exp_manager` sets them."""

    name, version = "note", 0

    def __init__(self, seen: list[tuple[int, dict[str, float]]]) -> None:
        super().__init__()
        self.seen = seen

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, dict(metrics)))

    def log_hyperparams(self, *unused, **named):
        pass


def _watch(seen: dict[str, Any], log_every: int, killed: int | None) -> None:
    from nemo_minitron.callbacks import reporter
    from nemo_minitron.callbacks.distillation import DistillationMonitor
    from nemo_minitron.callbacks.metrics import MetricsLogger
    from nemo_minitron.callbacks.stopping import SaveAndStop
    from nemo_minitron.models.distillation import MegatronGPTDistillationModel as Model

    training_step, validation_step, bind_loss = Model.training_step, Model.validation_step, Model.bind_loss
    setup, on_train_batch_end = DistillationMonitor.setup, SaveAndStop.on_train_batch_end

    def train_and_note(self, batch, batch_idx):
        step = self.trainer.global_step + 1
        note = seen["train"][step] = {"weights": _weights(self), "batches": [_tensors(batch)]}
        started = time.perf_counter()
        training_step(self, batch, batch_idx)
        time.sleep(SLOW.get(step, 0))
        note["seconds"] = time.perf_counter() - started

    def validate_and_note(self, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            seen["val"][self.trainer.global_step] = {"weights": _weights(self), "batches": []}
        seen["val"][self.trainer.global_step]["batches"].append(_tensors(batch))
        return validation_step(self, batch, batch_idx, dataloader_idx)

    def poison(self, targets, objective, *, statistics):
        loss = bind_loss(self, targets, objective, statistics=statistics)
        if self.trainer.training and self.trainer.global_step + 1 == POISONED:
            return lambda hidden, *rest: loss(hidden * float("nan"), *rest)
        return loss

    def setup_watched(self, trainer, *args, **named):
        self.every_n_steps = WATCHED
        [metrics] = [callback for callback in trainer.callbacks if isinstance(callback, MetricsLogger)]
        metrics.every_n_steps = log_every  # of this attempt
        trainer.loggers, trainer.log_every_n_steps = [NoteLogger(seen["logger"])], 1
        setup(self, trainer, *args, **named)

    def stop(self, trainer, *args):
        on_train_batch_end(self, trainer, *args)
        if trainer.global_step == killed:
            raise StoppedError

    Model.training_step, Model.validation_step, Model.bind_loss = train_and_note, validate_and_note, poison
    DistillationMonitor.setup, SaveAndStop.on_train_batch_end = setup_watched, stop
    reporter.LOG_INTERVAL = 0.0
    reporter.Reporter.line = lambda self, text: seen["lines"].append(text)


def _tensors(batch) -> tuple[torch.Tensor, ...]:
    return batch.tokens.clone(), batch.labels.clone(), batch.keep.clone()


def _weights(model) -> dict[str, torch.Tensor]:
    [chunk] = model.chunks
    return {weight.name: parameter.detach().clone() for weight, parameter in chunk.named_weights()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Inputs, run folder, and what the attempts have seen."""
    inputs, run = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("run") / "run"
    write_llama(inputs / "hf", trained_steps=100)
    write_corpus(inputs / "corpus")
    attempts = [(1, KILLED[0]), (1, KILLED[1]), (2, None)]
    return inputs, run, [run_on_ranks(1, train, run, inputs, *attempt)[0] for attempt in attempts]


def noted(attempts: list[dict[str, Any]], kind: str) -> dict[int, dict[str, Any]]:
    """What steps or validations had; of those that were done again, the last time."""
    return {step: note for attempt in attempts for step, note in attempt[kind].items()}


def student(weights: dict[str, torch.Tensor], teacher: LlamaConfig) -> LlamaForCausalLM:
    """Megatron's weights as a float64 Llama: rows of QKV lie by group as `[q..q, k, v]`, of fc1 as `[gate; up]`."""
    head, vocabulary = teacher.head_dim, teacher.vocab_size
    hidden = weights["decoder.final_layernorm.weight"].shape[0]
    queries = weights["decoder.layers.0.self_attention.linear_proj.weight"].shape[1] // head
    groups = (weights["decoder.layers.0.self_attention.linear_qkv.weight"].shape[0] // head - queries) // 2
    ffn = weights["decoder.layers.0.mlp.linear_fc2.weight"].shape[1]
    layers = sum(name.endswith("linear_fc2.weight") for name in weights)
    config = LlamaConfig(**teacher.to_dict() | {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": queries, "num_key_value_heads": groups,
        "rms_norm_eps": teacher.rms_norm_eps * teacher.hidden_size / hidden,  # pruning rescales norms
    })  # fmt: skip
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:vocabulary],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    for index in range(layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        qkv = weights[ours + "self_attention.linear_qkv.weight"].view(groups, -1, head, hidden)
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        state |= {
            theirs + "self_attn.q_proj.weight": qkv[:, :-2].reshape(-1, hidden),
            theirs + "self_attn.k_proj.weight": qkv[:, -2].reshape(-1, hidden),
            theirs + "self_attn.v_proj.weight": qkv[:, -1].reshape(-1, hidden),
            theirs + "self_attn.o_proj.weight": weights[ours + "self_attention.linear_proj.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "mlp.linear_fc2.weight"],
            theirs + "input_layernorm.weight": weights[ours + "self_attention.linear_qkv.layer_norm_weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "mlp.linear_fc1.layer_norm_weight"],
        }
    model = LlamaForCausalLM(config).double()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), "it is the embedding"
    return model


def measured(model: LlamaForCausalLM, teacher: LlamaForCausalLM, batches) -> dict[str, torch.Tensor]:
    """Means over kept tokens."""
    tokens, labels, keep = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        expected = teacher(tokens).logits.log_softmax(-1)
    found = model(tokens).logits.log_softmax(-1)

    def cross_entropy(log_probs):
        return -log_probs.gather(-1, labels[..., None])[keep].mean()

    kl, ce = (expected.exp() * (expected - found)).sum(-1)[keep].mean(), cross_entropy(found)
    agreement = (expected.argmax(-1) == found.argmax(-1))[keep].double().mean()
    values = {"kl": kl, "ce": ce, "teacher_ce": cross_entropy(expected), "agreement": agreement}
    return values | {"loss": kl + LM_WEIGHT * ce}


def learning_rate(step: int) -> float:
    if step <= WARMUP:
        return PEAK * step / WARMUP
    return LOWEST + (PEAK - LOWEST) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def expected_row(step: int, note: dict[str, Any], teacher: LlamaForCausalLM) -> dict[str, float]:
    model = student(note["weights"], teacher.config)
    values = measured(model, teacher, note["batches"])
    values["loss"].backward()
    squares = sum(parameter.grad.square().sum() for parameter in model.parameters())
    names = values if (step - 1) % WATCHED == 0 else ("kl", "loss")
    row = {f"train/{name}": float(values[name].detach()) for name in names} | {"train/grad_norm": float(squares.sqrt())}
    if step == POISONED:
        row = dict.fromkeys(row, math.nan)
    return row | {"train/lr": learning_rate(step), "train/skipped": float(step >= POISONED)}


def test_every_logged_number_is_that_of_its_step(trained):
    inputs, run, attempts = trained
    teacher = LlamaForCausalLM.from_pretrained(inputs / "hf", dtype=torch.float64).eval()
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "distill"]
    training = {row["step"]: row for row in rows if "train/loss" in row}
    validations = {row["step"]: row for row in rows if "val/kl" in row}
    assert list(training) == [1, 2, 3, 4, 5, 6, 8, 9], "7 is of an attempt that was killed"
    assert list(validations) == [0, 4, 8, 9]
    assert len(rows) == len(training) + len(validations)
    assert rows == read_rows(run / "stages/distill/metrics.jsonl")
    assert [list(attempt["train"]) for attempt in attempts] == [[1, 2, 3, 4, 5], [5, 6, 7], [7, 8, 9]]
    notes = noted(attempts, "train")
    for step, row in training.items():
        assert (row.pop("stage"), row.pop("step"), row.pop("tokens")) == ("distill", step, step * TOKENS)
        assert TOKENS / row.pop("train/tokens_per_second") >= notes[step]["seconds"]
        expected = expected_row(step, notes[step], teacher)
        assert row == pytest.approx(expected, rel=1e-5, nan_ok=True), step
    for step, row in validations.items():
        assert (row.pop("stage"), row.pop("step"), row.pop("tokens")) == ("distill", step, step * TOKENS)
        note = noted(attempts, "val")[step]
        with torch.no_grad():
            values = measured(student(note["weights"], teacher.config), teacher, note["batches"])
        assert row == pytest.approx({f"val/{name}": float(value) for name, value in values.items()}, rel=1e-5), step
    for name, tensor in notes[POISONED]["weights"].items():
        assert torch.equal(tensor, notes[POISONED + 1]["weights"][name]), "a skipped step changes nothing"


def test_tensorboard_has_what_the_file_has_once(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run, _ = trained
    board = EventAccumulator(str(run / "tensorboard/distill"))
    board.Reload()
    found = [(name, event.step, event.value) for name in board.Tags()["scalars"] for event in board.Scalars(name)]
    written = {
        (name, row["step"]): value
        for row in read_rows(run / "stages/distill/metrics.jsonl")
        for name, value in row.items()
        if "/" in name
    }
    assert len(found) == len(written)
    assert {(name, step): value for name, step, value in found} == pytest.approx(written, rel=1e-6, nan_ok=True)


def test_the_terminal_says_at_which_step_a_validation_measured(trained):
    _, run, attempts = trained
    rows = read_rows(run / "stages/distill/metrics.jsonl")
    training = {row["step"]: row for row in rows if "train/loss" in row}
    validations = {row["step"]: row for row in rows if "val/kl" in row}
    lines = [line for attempt in attempts for line in attempt["lines"] if re.match(r"distill \d+/9 steps", line)]
    form = re.compile(r"distill (\d+)/9 steps · loss (\S+) · held-out KL (\S+) at step (\d+) · lr (\S+) · \S+ tokens/s")
    shown = [form.match(line).groups() for line in lines if form.match(line)]
    assert [int(step) for step, *_ in shown] == [1, 2, 3, 4, 5, 5, 6, 7, 9], lines
    assert [int(at) for _, _, _, at, _ in shown] == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert [line.split()[1] for line in lines if "held-out" not in line] == ["7/9", "8/9"], "none of this attempt yet"
    for step, loss, kl, at, lr in shown:
        assert kl == f"{validations[int(at)]['val/kl']:.3f}"
        assert lr == f"{learning_rate(int(step)):.1e}"
        if int(step) in training:
            assert loss == f"{training[int(step)]['train/loss']:.3f}"


def test_loggers_of_lightning_count_the_steps_before(trained):
    """A training value stands at the steps before it, a validation at the last step: no shift after a resume."""
    _, run, attempts = trained
    rows = read_rows(run / "stages/distill/metrics.jsonl")
    training = {row["step"]: row for row in rows if "train/loss" in row}
    validations = {row["step"]: row for row in rows if "val/kl" in row}
    logged = [(step, values) for attempt in attempts for step, values in attempt["logger"]]
    losses = [(step + 1, values) for step, values in logged if "train/loss" in values]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1)), "a kill comes before loggers have the step"
    for step, values in losses:
        assert ("train/ce" in values) == ((step - 1) % WATCHED == 0)
        if step in training:
            assert values["train/kl"] == pytest.approx(training[step]["train/kl"], nan_ok=True)
    inside = [(step + 1, values["val/kl"]) for step, values in logged if "val/kl" in values and 0 < step < STEPS - 1]
    assert [step for step, _ in inside] == [4, 4, 8]
    assert [kl for _, kl in inside] == pytest.approx([validations[step]["val/kl"] for step, _ in inside])
