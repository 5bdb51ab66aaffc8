"""The example scripts run as their docstrings say, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores
from tests import jobs
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artefacts")
    write_llama(folder / "hf", trained_steps=60)
    write_corpus(folder / "corpus")
    run_on_ranks(1, jobs.prepare, folder)
    return folder


def distill(artefacts: Path, where: Path, *more: str) -> str:
    command = [
        *(sys.executable, str(EXAMPLES / "megatron_gpt_distillation.py")),
        *(f"model.{name}={artefacts / name}" for name in ("student", "data")),
        f"model.minitron.distillation.teacher={artefacts / 'teacher'}",
        *("model.precision=32", "model.encoder_seq_length=64", "trainer.val_check_interval=3"),
        f"exp_manager.exp_dir={where}",
        *more,
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=where, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout + ended.stderr


@pytest.mark.slow
def test_exp_manager_logs_checkpoints_resumes_and_leaves_a_nemo(artefacts, tmp_path):
    distill(artefacts, tmp_path, "trainer.max_steps=6")
    checkpoints = next(tmp_path.rglob("checkpoints"))
    assert [path for path in checkpoints.iterdir() if path.name.endswith("-last.ckpt") and path.is_dir()]
    assert list(tmp_path.rglob("events.out.tfevents*"))
    student = open_checkpoint(artefacts / "student").spec
    assert open_checkpoint(checkpoints / "minitron_student.nemo").spec == student
    where = f"exp_manager.explicit_log_dir={checkpoints.parent}"
    distill(artefacts, tmp_path, "trainer.max_steps=9", "exp_manager.resume_if_exists=true", where)
    last = next(path for path in checkpoints.iterdir() if path.name.endswith("-last.ckpt"))
    progress = torch.load(last / "common.pt", weights_only=False)["common"]["loops"]["fit_loop"]
    batches = progress["epoch_loop.batch_progress"]
    assert (batches["total"]["completed"], batches["current"]["completed"]) == (9, 9)
    assert len(_events(checkpoints.parent)) == 9, "the second run goes on after the first one's last step"


@pytest.mark.slow
def test_unknown_keys_end_a_script_with_status_2_before_anything_starts(tmp_path):
    command = [
        *(sys.executable, str(EXAMPLES / "megatron_gpt_distillation.py"), "model.student=none", "model.data=none"),
        *("model.minitron.distillation.teacher=none", "+model.minitron.distillation.temprature=4"),
        *("+model.temperature=4", "model.optim.name=sgd", "+trainer.accumulate_grad_batches=2"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 2, ended.stderr[-3000:]
    said = ended.stderr[ended.stderr.index("error: hydra configuration: 4 problem(s)") :]
    for key in ("distillation.temprature: unknown", "model.temperature: unknown", "name = 'sgd'", "grad_batches = 2"):
        assert key in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_pruning_needs_only_the_callbacks_and_a_nemo_config(artefacts, tmp_path):
    command = [
        *(sys.executable, str(EXAMPLES / "megatron_gpt_prune.py")),
        *(f"model.restore_from_path={artefacts / 'teacher'}", f"model.data={artefacts / 'data'}"),
        *(
            "model.precision=32",
            "model.encoder_seq_length=64",
            "pruning.samples=8",
            f"pruning.folder={tmp_path / 'out'}",
        ),
        *("pruning.target.ffn_hidden_size=0.5", "+pruning.target.num_layers=3"),
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    plan = PruningPlan.load(tmp_path / "out" / "plan.json")
    assert plan.table() in ended.stdout
    assert (plan.student.num_layers, plan.student.layer.mlp.ffn_hidden_size) == (3, 48)
    scores = Scores.load(tmp_path / "out" / "scores.safetensors")
    assert scores.samples == 8
    assert scores.provenance["tokenizer_digest"]
    for name in ("student.nemo", "student_hf"):
        assert open_checkpoint(tmp_path / "out" / name).spec == plan.student
        assert PruningPlan.of_checkpoint(tmp_path / "out" / name) == plan
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student_hf")(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def _events(folder: Path):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator.Scalars("train/loss")
