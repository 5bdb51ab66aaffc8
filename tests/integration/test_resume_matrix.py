"""A stopped training goes on with another value of each setting, through a recipe and through a hydra script.

Every setting goes on exactly or is refused. What each step read and used is noted inside the steps: samples are counted
one by one against an undisturbed training, and learning rates are compared with the closed form of what was asked for.
"""

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config.load import known_keys
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.megatron.token_files import read_info
from tests import chain_jobs, resume_jobs
from tests.ranks import run_on_ranks
from tests.resume_jobs import BATCH, LENGTH, SAVED, STEPS
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow

SAME, NEAR, OTHER, REFUSED = "same bytes", "same but for rounding", "as asked", "refused"
OPTIM, SCHED = "model.optim.", "model.optim.sched."
DISTILLATION, GUARD = "model.minitron.distillation.", "model.minitron.guard."
LONGER = 14


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        outcome: Of the weights that the training ends with, against an undisturbed one; or refused.
        value: The other value in a recipe.
        hydra: Keys and values of the script's configuration; None where it has no such setting.
        recipe: Where the recipe's change is not this key's value alone.
        used: What every step after the resume is to use instead.
    """

    outcome: str
    value: Any
    hydra: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    used: Mapping[str, Any] = field(default_factory=dict)


def told(outcome: str, value: Any, key: str, **used: Any) -> Row:
    """A setting that has the same value under the script's key."""
    return Row(outcome, value, {key: value}, used=used)


def hidden(**changes: Any) -> Row:
    values = {"layers": [[-1, -1]], **changes}
    return Row(REFUSED, values, {f"{DISTILLATION}hidden": values}, {"distill.hidden": values})


ROWS: dict[str, Row] = {
    "tokens": Row(OTHER, LONGER * BATCH * LENGTH, {"trainer.max_steps": LONGER}, used={"steps": LONGER}),
    "minutes": Row(REFUSED, 5, recipe={"distill.minutes": 5, "distill.tokens": None}),
    "minutes_of": Row(REFUSED, "run"),
    "batch.sequence_length": told(REFUSED, 16, "model.encoder_seq_length"),
    "batch.micro_batch_size": told(NEAR, 1, "model.micro_batch_size"),
    "batch.global_batch_size": told(REFUSED, 8, "model.global_batch_size"),
    "optimizer.lr": told(OTHER, 1e-3, f"{OPTIM}lr", lr=1e-3),
    "optimizer.min_lr": told(OTHER, 1e-3, f"{SCHED}min_lr", min_lr=1e-3),
    "optimizer.warmup_steps": told(OTHER, 8, f"{SCHED}warmup_steps", warmup=8),
    "optimizer.schedule": Row(OTHER, "linear", {f"{SCHED}name": "WarmupAnnealing"}, used={"schedule": "linear"}),
    "optimizer.decay_fraction": Row(
        OTHER,
        0.5,
        {f"{SCHED}name": "WarmupStableDecay", f"{SCHED}decay_fraction": 0.5},
        {"distill.optimizer.schedule": "wsd", "distill.optimizer.decay_fraction": 0.5},
        {"schedule": "wsd", "decay_fraction": 0.5},
    ),
    "optimizer.weight_decay": told(OTHER, 0.5, f"{OPTIM}weight_decay", weight_decay=0.5),
    "optimizer.beta1": Row(REFUSED, 0.8, {f"{OPTIM}betas": [0.8, 0.95]}),
    "optimizer.beta2": Row(REFUSED, 0.9, {f"{OPTIM}betas": [0.9, 0.9]}),
    "optimizer.eps": told(OTHER, 1e-4, f"{OPTIM}eps", eps=1e-4),
    "optimizer.clip_grad": told(OTHER, 0.01, f"{OPTIM}clip_grad", clip_grad=0.01),
    "optimizer.distributed": told(REFUSED, True, f"{OPTIM}distributed"),
    "validate_every": told(SAME, 3, "trainer.val_check_interval"),
    "validation_samples": told(REFUSED, 8, "model.validation_samples"),
    "checkpoint_every": Row(SAME, 2),
    "keep_last": Row(SAME, 1, {"exp_manager.checkpoint_callback_params.save_top_k": 2}),
    "async_save": Row(SAME, True),
    "log_every": told(SAME, 3, "trainer.log_every_n_steps"),
    "patience": Row(SAME, 5),
    "finish_with": Row(REFUSED, "best"),
    "guard.spike_factor": told(SAME, 1e6, f"{GUARD}spike_factor"),
    "guard.max_consecutive_skips": told(SAME, 3, f"{GUARD}max_consecutive_skips"),
    "kd_weight": told(REFUSED, 0.5, f"{DISTILLATION}kd_weight"),
    "lm_weight": told(REFUSED, 0.5, f"{DISTILLATION}lm_weight"),
    "hidden_weight": told(REFUSED, 0.5, f"{DISTILLATION}hidden_weight"),
    "router_weight": told(REFUSED, 0.5, f"{DISTILLATION}router_weight"),
    "balance_weight": told(REFUSED, 0.5, f"{DISTILLATION}balance_weight"),
    "hidden.layers": hidden(),
    "hidden.embedding": hidden(embedding=True),
    "hidden.kind": hidden(kind="mse"),
    "hidden.balance": hidden(balance="none"),
    "hidden.projection": hidden(projection=True),
    "temperature": told(REFUSED, 2.0, f"{DISTILLATION}temperature"),
    "divergence": told(REFUSED, "reverse_kl", f"{DISTILLATION}divergence"),
    "beta": told(REFUSED, 0.3, f"{DISTILLATION}beta"),
    "skew": told(REFUSED, 0.3, f"{DISTILLATION}skew"),
    "top_k": told(REFUSED, 16, f"{DISTILLATION}top_k"),
    "ramp_to.kd_weight": told(REFUSED, 0.5, f"{DISTILLATION}ramp_to.kd_weight"),
    "ramp_to.lm_weight": told(REFUSED, 0.5, f"{DISTILLATION}ramp_to.lm_weight"),
    "ramp_to.hidden_weight": told(REFUSED, 0.5, f"{DISTILLATION}ramp_to.hidden_weight"),
    "ramp_to.temperature": told(REFUSED, 2.0, f"{DISTILLATION}ramp_to.temperature"),
    "freeze_embeddings": told(REFUSED, True, f"{DISTILLATION}freeze_embeddings"),
    "loss_chunk_tokens": told(NEAR, 7, f"{DISTILLATION}loss_chunk_tokens"),
    "teacher_precision": told(REFUSED, "bf16", f"{DISTILLATION}teacher_precision"),
    "teacher_fp8": told(REFUSED, True, f"{DISTILLATION}teacher_fp8"),
    "offload_teacher": told(SAME, True, f"{DISTILLATION}offload_teacher"),
}
"""Every setting of a training; one that is new needs a row."""

BESIDE: dict[str, Row] = {
    "fewer tokens": Row(
        OTHER, 9 * BATCH * LENGTH, {"trainer.max_steps": 9}, {"distill.tokens": 9 * BATCH * LENGTH}, {"steps": 9}
    ),
    "tokens that are read": Row(
        REFUSED, 5 * BATCH * LENGTH, {"trainer.max_steps": 5}, {"distill.tokens": 5 * BATCH * LENGTH}
    ),
    "precision": Row(REFUSED, "bf16", {"model.precision": "bf16"}, {"precision": "bf16"}),
    "seed": Row(REFUSED, 7, {"model.seed": 7}, {"seed": 7}),
    "parallel.recompute": Row(
        SAME,
        "selective",
        {"model.activations_checkpoint_granularity": "selective"},
        {"parallel.recompute": "selective"},
    ),
    "sched.max_steps": Row(OTHER, 10, {f"{SCHED}max_steps": 10}, {}, {"schedule_steps": 10}),
    "sched.constant_steps": Row(OTHER, 4, {f"{SCHED}constant_steps": 4}, {}, {"constant": 4}),
    "trainer.gradient_clip_val": Row(OTHER, 0.01, {"trainer.gradient_clip_val": 0.01}, {}, {"clip_grad": 0.01}),
}
"""Other sections of a recipe, keys of the script alone, and other values."""


def learning_rate(step: int, **asked: Any) -> float:
    """Of one step (from 1), in closed form."""
    lr, low, warmup = (asked.get(name, usual) for name, usual in (("lr", 2e-3), ("min_lr", 2e-4), ("warmup", 3)))
    schedule = asked.get("schedule", "cosine")
    last = asked.get("schedule_steps", asked.get("steps", STEPS))
    share = asked.get("decay_fraction", 0.2)
    if step <= warmup:
        return lr * step / warmup
    falling = (step - warmup) / (last - asked.get("constant", 0) - warmup)
    if schedule == "wsd":
        falling = 1 - (last - step) / round(share * last)
    falling = min(max(falling, 0), 1)
    curve = (1 + math.cos(math.pi * falling)) / 2 if schedule == "cosine" else 1 - falling
    return low + (lr - low) * curve


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=20)
    write_corpus(folder / "corpus", documents=20, sentences_each=10)
    return folder


@pytest.fixture(scope="module")
def pruned(inputs, tmp_path_factory) -> Path:
    """A run folder with all stages before distillation."""
    run = tmp_path_factory.mktemp("pruned") / "run"
    run_on_ranks(1, chain_jobs.run_to, run, inputs, "prune")
    return run


@pytest.fixture(scope="module")
def epoch(pruned) -> int:
    """Samples of one epoch: each has a token more than it predicts."""
    return (read_info(pruned / "stages/data")["splits"]["train"]["tokens"] - 1) // LENGTH


@pytest.fixture(scope="module")
def recipe(inputs, pruned, epoch, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What the recipe's attempts did, by row."""
    run = shutil.copytree(pruned, tmp_path_factory.mktemp("recipe") / "run")
    rows = {name: row.recipe for name, row in BESIDE.items() if row.recipe}
    rows |= {key: row.recipe or {f"distill.{key}": row.value} for key, row in ROWS.items()}
    rows |= {"nothing": {}, "epochs": {"distill.tokens": epochs(epoch) * BATCH * LENGTH}}
    return run_on_ranks(1, resume_jobs.recipe_rows, run, inputs, rows)[0]


@pytest.fixture(scope="module")
def hydra(pruned, epoch, inputs, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What the script's attempts did, by row."""
    rows = {name: row.hydra for name, row in (ROWS | BESIDE).items() if row.hydra is not None}
    rows |= {"nothing": {}, "epochs": {"trainer.max_steps": epochs(epoch)}, **files(pruned, inputs, tmp_path_factory)}
    return run_on_ranks(1, resume_jobs.hydra_rows, pruned, tmp_path_factory.mktemp("hydra"), rows)[0]


def epochs(epoch: int) -> int:
    """Steps of two epochs and a bit."""
    return 2 * epoch // BATCH + 2


def files(pruned: Path, inputs: Path, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Checkpoints and data that are other ones, or the same at another place."""
    folder = tmp_path_factory.mktemp("files")
    teacher = shutil.copytree(pruned / "stages/import/teacher", folder / "teacher")
    student, other = (shutil.copytree(pruned / "stages/prune/student", folder / name) for name in ("student", "other"))
    weights = max(other.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    shutil.copytree(inputs / "hf", folder / "hf")
    write_corpus(folder / "corpus", documents=21, sentences_each=10)
    run_on_ranks(1, chain_jobs.run_to, folder / "run", folder, "data")
    return {
        "another place": {"model.student": str(student), f"{DISTILLATION}teacher": str(teacher)},
        "another student": {"model.student": str(other)},
        "another teacher": {f"{DISTILLATION}teacher": str(inputs / "hf")},
        "other data": {"model.data": str(folder / "run/stages/data")},
        "late weights": {"model.minitron.parallel.overlap_param_gather": True},
    }


def test_every_setting_of_a_training_has_a_row():
    keys = known_keys(DistillConfig)
    leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert set(ROWS) == leaves


def test_an_undisturbed_training_is_what_it_was_asked_to_be(recipe, hydra, epoch):
    whole = recipe["complete"]
    assert list(whole["samples"]) == list(range(1, STEPS + 1))
    assert len({sample for samples in whole["samples"].values() for sample in samples}) == STEPS * BATCH
    assert epoch >= LONGER * BATCH
    assert used_problems(whole, {}, first=1) == []
    assert all(torch.equal(*pair) for pair in zip(hydra["nothing"]["weights"], whole["weights"], strict=True))


@pytest.mark.parametrize("name", [*ROWS, *BESIDE, "nothing"])
def test_a_recipe_goes_on_exactly_or_is_refused(name, recipe):
    row = (ROWS | BESIDE).get(name, Row(SAME, None))
    if name in recipe:
        assert problems(recipe, name, row) == []
    else:
        assert row.recipe == {}


@pytest.mark.parametrize("name", [*ROWS, *BESIDE, "nothing", "another place"])
def test_a_script_goes_on_exactly_or_is_refused(name, recipe, hydra):
    row = (ROWS | BESIDE).get(name, Row(SAME, None))
    if name in hydra:
        assert problems({**hydra, "complete": recipe["complete"]}, name, row) == []
    else:
        assert row.hydra is None


@pytest.mark.parametrize(
    ("name", "key"), [("another student", "student"), ("another teacher", "teacher"), ("other data", "data")]
)
def test_a_script_is_refused_other_files(name, key, hydra):
    said = hydra[name]["said"]
    assert (hydra[name]["status"], hydra[name]["samples"]) == (2, {})
    assert f"- {key}: " in said
    assert " in the checkpoint, now " in said


def test_a_layout_that_the_optimizer_cannot_have_is_refused_before_a_step(hydra):
    """By the key, where the script's defaults leave open whether the optimizer's states are split."""
    assert (hydra["late weights"]["status"], hydra["late weights"]["samples"]) == (2, {})
    assert "overlap_param_gather = true without the distributed optimizer" in hydra["late weights"]["said"]
    assert "minitron.parallel.overlap_param_gather" in hydra["late weights"]["said"]


def problems(found: dict[str, dict[str, Any]], name: str, row: Row) -> list[str]:
    """What an attempt did that was not asked for."""
    attempt, whole = found[name], found["complete"]
    if row.outcome is REFUSED:
        return refusal_problems(attempt, row)
    said = attempt.get("refused", "") + str(attempt.get("status", ""))
    if said:
        return [said, attempt.get("said", "")]
    steps = row.used.get("steps", STEPS)
    twice, lost = counted(found, name, steps)
    wrong = [f"{twice} samples twice, {lost} lost"] * bool(twice or lost) + used_problems(attempt, row.used)
    pairs = list(zip(attempt["weights"], whole["weights"], strict=True))
    equal = all(torch.equal(*pair) for pair in pairs)
    near = all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in pairs)
    if not {SAME: equal, NEAR: near, OTHER: not near}[row.outcome]:
        wrong.append(f"the weights are not {row.outcome}")
    if row.used and "result" in attempt and not attempt["result"].get("changes"):
        wrong.append("the result does not say what was changed")
    return wrong


def refusal_problems(attempt: dict[str, Any], row: Row) -> list[str]:
    """Before any step, with both values and the reason."""
    said = attempt.get("refused", "") + attempt.get("said", "")
    wrong = [f"step {step} was done" for step in attempt["samples"]]
    if not any("now" in line and ("in the checkpoint" in line or "made with" in line) for line in said.splitlines()):
        wrong.append(f"does not say both values: {said!r}")
    if "remedy:" not in said:
        wrong.append("has no remedy")
    if "said" in attempt and attempt.get("status") != 2:
        wrong.append(f"ends with status {attempt.get('status')}")
    return wrong


def counted(found: dict[str, dict[str, Any]], name: str, steps: int) -> tuple[int, int]:
    """Samples of the complete training that were read more than once, and those of the undisturbed one that were not.

    The checkpoint is of step 6; the steps between that and the kill are done again.
    """
    first, second = found["stopped"]["samples"], found[name]["samples"]
    assert list(second) == list(range(SAVED + 1, steps + 1)), list(second)
    read = [sample for step in range(1, SAVED + 1) for sample in first[step]]
    read += [sample for samples in second.values() for sample in samples]
    wanted = [sample for samples in found["complete"]["samples"].values() for sample in samples][: steps * BATCH]
    assert read[: len(wanted)] == wanted, "the order is another one"
    twice = sum(count - 1 for count in Counter(read).values())
    return twice, len(set(wanted) - set(read))


def used_problems(attempt: dict[str, Any], asked: Mapping[str, Any], *, first: int = SAVED + 1) -> list[str]:
    """Steps whose optimizer used something else than was asked for."""
    usual = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_grad": 1.0}
    wrong = []
    for step, groups in attempt["used"].items():
        for group in groups:
            expected = {name: asked.get(name, value) for name, value in usual.items()}
            expected |= {"lr": learning_rate(step, **asked), "weight_decay": expected["weight_decay"] * group["decays"]}
            wrong += [
                f"step {step} used {name} {group[name]}, not {value}"
                for name, value in expected.items()
                if not math.isclose(group[name], value, rel_tol=1e-9)
            ]
    assert next(iter(attempt["used"])) == first
    return wrong


@pytest.mark.parametrize("door", ["recipe", "hydra"])
def test_a_training_that_becomes_longer_than_an_epoch_reads_each_sample_once_an_epoch(door, recipe, hydra, epoch):
    found = {"recipe": recipe, "hydra": hydra}[door]
    first, second = found["stopped"]["samples"], found["epochs"]["samples"]
    read = [sample for step in range(1, SAVED + 1) for sample in first[step]]
    read += [sample for samples in second.values() for sample in samples]
    assert len(read) == epochs(epoch) * BATCH > 2 * epoch
    assert len(set(read[:epoch])) == epoch, "all samples of the first epoch, each once"
    assert used_problems(found["epochs"], {"steps": epochs(epoch)}) == []


def test_a_script_of_one_s_own_is_compared_too(pruned, tmp_path):
    """By the strategy, before it reads weights."""
    rows = {name: ROWS[name].hydra for name in ("optimizer.lr", "batch.global_batch_size", "temperature")}
    [found] = run_on_ranks(1, _own_script, pruned, tmp_path, rows)
    assert used_problems(found["optimizer.lr"], {"lr": 1e-3}) == []
    for name in ("batch.global_batch_size", "temperature"):
        assert refusal_problems(found[name], ROWS[name]) == []


def _own_script(pruned: Path, where: Path, rows: dict[str, Any]) -> dict[str, Any]:
    return resume_jobs.hydra_rows(pruned, where, rows, early=False)


def test_states_of_the_optimizer_stay_as_they_are_split_where_nothing_is_said(pruned, inputs, tmp_path):
    """So that a training of several GPUs, which splits them, goes on on one, and the other way round."""
    run = shutil.copytree(pruned, tmp_path / "run")
    [found] = run_on_ranks(1, _split, run, inputs)
    assert found["nothing"]["result"]["changes"] == []
    assert counted(found, "nothing", STEPS) == (0, 0)
    assert all(
        torch.equal(*pair) for pair in zip(found["nothing"]["weights"], found["complete"]["weights"], strict=True)
    )
    assert "optimizer.distributed (optim.distributed): True in the checkpoint, now False" in found["no"]["refused"]


def _split(run: Path, inputs: Path) -> dict[str, Any]:
    key = "distill.optimizer.distributed"
    rows = {"nothing": {key: None}, "no": {key: False}}
    return resume_jobs.recipe_rows(run, inputs, rows, begun={key: True})


def test_the_matrix(recipe, hydra, capsys):
    """Prints it."""
    lines = [f"{'setting':26} {'other value':>22}  {'recipe':24} {'hydra':24}"]
    counts: Counter[str] = Counter()
    for name, row in (ROWS | BESIDE).items():
        cells = [cell(door, name, row) for door in (recipe, {**hydra, "complete": recipe["complete"]})]
        counts.update(text.partition(":")[0] for text in cells)
        lines.append(f"{name:26} {str(row.value)[:22]:>22}  {cells[0]:24} {cells[1]:24}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
        print("goes on: samples read twice, samples lost, largest relative error of the learning rate of a step")
        print(f"{counts['goes on']} go on, {counts['refused']} are refused, {counts['-']} have no such key")


def cell(door: dict[str, dict[str, Any]], name: str, row: Row) -> str:
    if name not in door:
        return "-"
    if not door[name]["samples"]:
        return "refused"
    twice, lost = counted(door, name, row.used.get("steps", STEPS))
    rates = {step: groups[0]["lr"] for step, groups in door[name]["used"].items()}
    furthest = max(abs(rate / learning_rate(step, **row.used) - 1) for step, rate in rates.items())
    return f"goes on: {twice}, {lost}, {furthest:.0e}"
