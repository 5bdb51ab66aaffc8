"""Training that can be left alone: harmful steps are skipped, it ends when it gets no better, it goes on anywhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import chain_jobs
from tests.ranks import RankError, run_on_ranks
from tests.tiny import write_corpus, write_llama

# After warm-up the rate stays; without moments' decay towards zero the effect of a step is easy to see.
STEADY = {"lr": 1e-3, "min_lr": 0.0, "warmup_steps": 0, "schedule": "constant"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def pruned(inputs, tmp_path_factory) -> Path:
    """A run folder with all stages before distillation."""
    run = tmp_path_factory.mktemp("pruned") / "run"
    run_on_ranks(1, chain_jobs.run_to, run, inputs, "prune")
    return run


@pytest.fixture
def run(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "run"))


def distill(run: Path, inputs: Path, before=None, ranks: int = 1, parallel=None, **settings):
    return run_on_ranks(ranks, _distill, run, inputs, before, settings, parallel or {})


def _distill(run: Path, inputs: Path, before, settings, parallel):
    results = chain_jobs.run_to(run, inputs, "distill", before=before, distill=settings, parallel=parallel)
    return results["distill"], chain_jobs.weights(run), _seen


_seen: dict[str, object] = {}


def poison_second_rank() -> None:
    """Losses of rank 1 are NaN at steps 3 and 4; notes what each step did to weights and moments."""
    _poison(steps={2, 3}, rank=1)


def poison_everything() -> None:
    """Every loss from the sixth step on is NaN."""
    _poison(steps=set(range(5, 100)), rank=0)


def _poison(steps: set[int], rank: int) -> None:
    from nemo_minitron.models.distillation import MegatronGPTDistillationModel as Model

    bind_loss, training_step = Model.bind_loss, Model.training_step

    def poisoned(self, targets, objective, *, statistics):
        loss = bind_loss(self, targets, objective, statistics=statistics)
        if not (self.trainer.training and self.trainer.global_step in steps and self.runtime.rank == rank):
            return loss

        return lambda hidden, *rest: loss(hidden * float("nan"), *rest)

    def watched(self, batch, batch_idx):
        before = _state(self)
        step = self.trainer.global_step
        training_step(self, batch, batch_idx)
        after = _state(self)
        _seen[step] = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))

    Model.bind_loss = poisoned
    Model.training_step = watched


def _state(model) -> list[torch.Tensor]:
    """Weights, moments and step counts."""
    inner = model.optimizers().optimizer.inner
    moments = [value for adam in inner._moments() for value in adam.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *moments]]


def test_a_step_that_is_not_a_number_on_one_rank_is_skipped_on_all(run, inputs):
    ranks = distill(run, inputs, before=poison_second_rank, ranks=2)
    for result, weights, untouched in ranks:
        assert result["skipped_steps"] == 2
        assert result["steps"] == 20
        assert [step for step, same in untouched.items() if same] == [2, 3]
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_too_many_skipped_steps_end_training_with_a_reason(run, inputs):
    with pytest.raises(RankError, match=r"4 training steps in a row were skipped; the last one because .* is nan"):
        distill(run, inputs, before=poison_everything, guard={"max_consecutive_skips": 4})
    assert list((run / "stages/.distill.partial/checkpoints").glob("00000005.ckpt")), "what was saved before stays"


def test_training_ends_when_it_gets_no_better_and_leaves_the_best_weights(run, inputs, tmp_path):
    """With a rate that does more and more harm it soon ends; what is left validates as the best did."""
    again = shutil.copytree(run, tmp_path / "again")
    harmful = {"optimizer": {**STEADY, "lr": 10.0, "warmup_steps": 20}, "validate_every": 2, "checkpoint_every": 2}
    ((result, _, _),) = distill(run, inputs, patience=2, finish_with="best", keep_last=2, **harmful)
    validations = result["history"][1:]
    best = min(validations, key=lambda row: row["kl"])
    assert result["ended_early"]
    assert result["steps"] == best["step"] + 4 < 20
    assert (result["best"]["step"], result["finished_with"]) == (best["step"], best["step"])
    assert result["validation"] == best
    assert [row["step"] for row in validations] == list(range(2, result["steps"] + 1, 2))
    shutil.rmtree(again / "stages/prune/student")
    shutil.copytree(run / "stages/distill/student", again / "stages/prune/student")
    ((from_there, _, _),) = distill(again, inputs, tokens=8 * 64)
    assert from_there["history"][0]["kl"] == pytest.approx(best["kl"], rel=1e-5)
    assert best["kl"] < 0.999 * validations[-1]["kl"], "the last one would have been told apart"


def note_temperatures() -> None:
    """Note what the loss of each step, and of each validation, is made with."""
    from nemo_minitron.models.distillation import MegatronGPTDistillationModel as Model

    bind_loss = Model.bind_loss

    def noting(self, targets, objective, *, statistics):
        key = self.trainer.global_step if self.trainer.training else "validation"
        _seen[key] = (objective.temperature, objective.kd_weight, objective.lm_weight)
        return bind_loss(self, targets, objective, statistics=statistics)

    Model.bind_loss = noting


def test_weights_and_temperature_follow_straight_lines(run, inputs):
    ramp = {"temperature": 3.0, "lm_weight": 0.0, "ramp_to": {"temperature": 1.0, "lm_weight": 1.0}}
    ((result, _, seen),) = distill(run, inputs, before=note_temperatures, tokens=5 * 8 * 64, **ramp)
    assert [seen[step] for step in range(5)] == [
        pytest.approx(expected) for expected in [(3, 1, 0), (2.5, 1, 0.25), (2, 1, 0.5), (1.5, 1, 0.75), (1, 1, 1)]
    ]
    assert seen["validation"] == (1, 1, 1)
    assert "0 to 1 x cross-entropy" in result["objective"]


def stop_after_seven_steps() -> None:
    """As if the process were killed: nothing is tidied up."""
    from nemo_minitron.callbacks.stopping import SaveAndStop

    on_train_batch_end = SaveAndStop.on_train_batch_end

    def hook(self, trainer, *args):
        on_train_batch_end(self, trainer, *args)
        if trainer.global_step == 7:
            raise RuntimeError("stopped on purpose")

    SaveAndStop.on_train_batch_end = hook


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_at_another_data_parallel_size(run, inputs, tmp_path, before, after):
    whole = shutil.copytree(run, tmp_path / "complete")
    settings = {"optimizer": {**STEADY, "distributed": True}, "validate_every": 10, "checkpoint_every": 5}
    ((expected, weights, _),) = distill(whole, inputs, **settings)
    with pytest.raises(RankError, match="stopped on purpose"):
        distill(run, inputs, before=stop_after_seven_steps, ranks=before, **settings)
    result, resumed, _ = distill(run, inputs, ranks=after, **settings)[0]
    assert result["steps"] == expected["steps"]
    assert [row["step"] for row in result["history"]] == [0, 10, 20]
    for name, tensor in weights.items():
        np.testing.assert_allclose(resumed[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_run_that_gathers_weights_late_validates_saves_and_goes_on_bit_for_bit(run, inputs, tmp_path):
    """Its validations, best model and checkpoints read weights between steps, which half of the ranks have updated."""
    plain = shutil.copytree(run, tmp_path / "plain")
    ways = [
        {"overlap_grad_reduce": True, "grad_bucket_size": 3000, "overlap_param_gather": late} for late in (False, True)
    ]
    how = {"optimizer": {**STEADY, "distributed": True}, "validate_every": 3, "checkpoint_every": 5}
    settings = {**how, "finish_with": "best", "tokens": 12 * 8 * 64}
    expected, weights, _ = distill(plain, inputs, ranks=2, parallel=ways[0], **settings)[0]
    with pytest.raises(RankError, match="stopped on purpose"):
        distill(run, inputs, before=stop_after_seven_steps, ranks=2, parallel=ways[1], **settings)
    for result, resumed, _ in distill(run, inputs, ranks=2, parallel=ways[1], **settings):
        assert result["history"] == expected["history"]
        assert result["best"] == expected["best"]
        assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_a_run_with_losses_on_hidden_states_goes_on_bit_for_bit(run, inputs, tmp_path):
    """The projection, its moments and the balance come back."""
    whole = shutil.copytree(run, tmp_path / "complete")
    hidden = {"layers": [[-2, -2]], "embedding": True}
    settings = {"tokens": 10 * 8 * 64, "optimizer": STEADY, "checkpoint_every": 5, "hidden": hidden}
    ((expected, weights, _),) = distill(whole, inputs, **settings)
    with pytest.raises(RankError, match="stopped on purpose"):
        distill(run, inputs, before=stop_after_seven_steps, **settings)
    result, resumed, _ = distill(run, inputs, **settings)[0]
    assert result["history"] == expected["history"]
    assert "hidden" in result["history"][-1]
    assert result["history"][-1]["hidden"] < result["history"][0]["hidden"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    rows = [json.loads(line) for line in (run / "stages/distill/metrics.jsonl").read_text().splitlines()]
    measured = {frozenset(row) for row in rows if "train/loss" in row}
    assert len(measured) == 1, "the first step's check of the teacher leaves nothing in later rows"
    assert {"train/kl", "train/hidden"} <= measured.pop()


def watch_every_step() -> None:
    """The monitor also keeps what every training step measured, the last one's too."""
    from nemo_minitron.callbacks.distillation import DistillationMonitor

    setup = DistillationMonitor.setup

    def watching(self, *args, **named):
        self.every_n_steps = 1
        setup(self, *args, **named)

    DistillationMonitor.setup = watching


def test_a_monitor_that_watches_the_last_step_does_not_stand_for_its_validation(run, inputs):
    result, _, _ = distill(run, inputs, before=watch_every_step, tokens=2 * 8 * 64, validate_every=0)[0]
    rows = [(row["step"], row["source"]) for row in result["history"]]
    assert rows == [(0, "val"), (1, "train"), (2, "train"), (2, "val")]
    assert result["validation"] == result["history"][-1]


def test_a_corrected_teacher_teaches(inputs, tmp_path):
    """Everything after the correction is made from the corrected teacher, and nothing from the original one."""
    run = tmp_path / "corrected"
    correct = {"tokens": 4 * 8 * 64, "validate_every": 2, "checkpoint_every": 2, "validation_samples": 8}
    distill = {"tokens": 2 * 8 * 64}
    ((results, corrected),) = run_on_ranks(1, _correct, run, inputs, correct, distill)
    assert list(results) == ["import", "data", "correct", "score", "prune", "distill"]
    assert results["correct"]["history"][-1]["ce"] < results["correct"]["history"][0]["ce"]
    original = chain_jobs.weights(run, "import", "teacher")
    assert any(not torch.equal(tensor, original[name]) for name, tensor in corrected.items())
    # What the student learned from is as good on the same windows as the corrected teacher was.
    assert results["distill"]["history"][0]["teacher_ce"] == pytest.approx(results["correct"]["history"][-1]["ce"])


def _correct(run, inputs, correct, distill):
    results = chain_jobs.run_to(run, inputs, "distill", correct=correct, distill=distill)
    return results, chain_jobs.weights(run, "correct", "teacher")
