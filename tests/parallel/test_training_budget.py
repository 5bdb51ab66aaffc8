"""A training with a time budget: it ends in time, and with the bytes of one that was given its steps."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests import chain_jobs
from tests.ranks import RankError, run_on_ranks
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow
STEP, VALIDATION = 0.8, 0.1
BUDGET = 30.0
"""Seconds."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=20)
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def pruned(inputs, tmp_path_factory) -> Path:
    """A run folder with all stages before distillation."""
    run = tmp_path_factory.mktemp("pruned") / "run"
    run_on_ranks(1, chain_jobs.run_to, run, inputs, "prune")
    return run


class Clock:
    """Time that passes in training steps and validation batches alone, however busy the machine is."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


def slow_steps() -> None:
    """A step takes 0.8 s and a validation batch 0.1 s."""
    from nemo_minitron.callbacks import throughput
    from nemo_minitron.models.distillation import MegatronGPTDistillationModel as Model
    from nemo_minitron.stages import engine, training, trial

    clock = Clock()
    for module in (throughput, engine, training, trial):
        module.time = clock
    for name, seconds in {"training_step": STEP, "validation_step": VALIDATION}.items():
        setattr(Model, name, _timed(getattr(Model, name), clock, seconds))


def _timed(method, clock: Clock, seconds: float):
    @functools.wraps(method)
    def timed(self, *args, **kwargs):
        clock.now += seconds
        return method(self, *args, **kwargs)

    return timed


def stop_after_seven_slow_steps() -> None:
    """As if the process were killed, in the training, not in the trial before it."""
    from nemo_minitron.callbacks.stopping import SaveAndStop

    slow_steps()
    on_train_batch_end = SaveAndStop.on_train_batch_end

    def hook(self, trainer, *args):
        on_train_batch_end(self, trainer, *args)
        if trainer.global_step == 7:
            raise RuntimeError("stopped on purpose")

    SaveAndStop.on_train_batch_end = hook


def distill(run: Path, inputs: Path, before=None, ranks: int = 1, **settings):
    return run_on_ranks(ranks, _distill, run, inputs, before, settings)


def _distill(run: Path, inputs: Path, before, settings):
    results = chain_jobs.run_to(run, inputs, "distill", before=before, distill=settings)
    return results["distill"], chain_jobs.weights(run)


MINUTES = {"tokens": None, "minutes": 0.5, "validate_every": 0.5, "checkpoint_every": 0.25}
SCHEDULE = {"optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 0.2}}


def seconds_of(steps: int) -> float:
    """A training of so many steps, with one validation batch before, in the middle and at the end."""
    return steps * STEP + 3 * VALIDATION


def test_a_stopped_run_goes_on_to_the_bytes_of_one_that_was_given_its_steps(pruned, inputs, tmp_path):
    """In the second attempt the machine is another one; a new measurement would give another number of steps."""
    run, plain = (Path(shutil.copytree(pruned, tmp_path / name)) for name in ("run", "plain"))
    with pytest.raises(RankError, match="stopped on purpose"):
        distill(run, inputs, before=stop_after_seven_slow_steps, **MINUTES, **SCHEDULE)
    fixed = json.loads((run / "stages/.distill.partial/budget.json").read_text())
    assert fixed["measured_seconds"]["step"] == pytest.approx(STEP)
    trial = VALIDATION + 3 * STEP
    assert seconds_of(fixed["steps"]) <= BUDGET - trial < seconds_of(fixed["steps"] + 1)

    ((result, resumed),) = distill(run, inputs, **MINUTES, **SCHEDULE)
    assert result["steps"] == fixed["steps"]
    assert result["budget"] == fixed
    assert [row["step"] for row in result["history"]] == [0, -(-fixed["steps"] // 2), fixed["steps"]]

    given = {**MINUTES, **SCHEDULE, "minutes": None, "tokens": fixed["tokens"]}
    ((expected, weights),) = distill(plain, inputs, **given)
    assert expected["history"] == result["history"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_ranks_agree_on_the_steps_and_end_within_the_budget(pruned, inputs, tmp_path):
    run = Path(shutil.copytree(pruned, tmp_path / "run"))
    ranks = distill(run, inputs, before=slow_steps, ranks=2, **MINUTES, **SCHEDULE)
    assert ranks[0][0]["steps"] == ranks[1][0]["steps"]
    assert 0.9 * BUDGET <= ranks[0][0]["seconds"] <= BUDGET
    assert not list((run / "stages/distill").glob("*.ckpt"))


def test_a_budget_that_is_too_short_is_refused_with_the_measured_step(pruned, inputs, tmp_path):
    run = Path(shutil.copytree(pruned, tmp_path / "run"))
    with pytest.raises(RankError, match=r"distill\.minutes = 0\.01: one optimizer step takes 0\.8 s here \(measured\)"):
        distill(run, inputs, before=slow_steps, **{**MINUTES, "minutes": 0.01})
