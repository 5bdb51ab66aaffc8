"""The complete job from the command line on a tiny model: once undisturbed, once killed in every stage."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.load import load_recipe
from nemo_minitron.stages.chain import chain_for
from tests.support import runs
from tests.support.runs import RECIPE, command, environment, start, training_rows, wait_for, weights

NAMES = tuple(stage.name for stage in chain_for(load_recipe(RECIPE, ["model.source=m", "data.sources=[t]"])))
inputs = runs.inputs


@pytest.fixture(scope="module")
def temporary(tmp_path_factory) -> Path:
    """What these runs take for the system's temporary folder."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def undisturbed(inputs, temporary, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finished = subprocess.run(
        command(run, inputs), capture_output=True, text=True, env=environment(temporary), check=False
    )
    assert finished.returncode == 0, finished.stderr
    return run


def test_nothing_is_left_in_the_temporary_folder(undisturbed, temporary):
    assert not list(temporary.iterdir())


def test_summary_has_what_is_promised(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["params"]["student"] < summary["params"]["teacher"]
    assert summary["perplexity"]["distilled"] < summary["perplexity"]["pruned"]
    assert summary["tokens"] == 10240
    assert summary["tokens_per_second"] > 0
    assert set(summary["seconds"]) >= set(NAMES) - {"report"}


def test_run_folder_is_complete(undisturbed):
    for name in ("config.resolved.yaml", "manifest.json", "metrics.jsonl", "report.html", "README.md"):
        assert (undisturbed / name).stat().st_size > 0, name
    assert any((undisturbed / "tensorboard").iterdir())
    assert all((undisturbed / "stages" / name / "DONE").is_file() for name in NAMES)
    assert not list((undisturbed / "stages").glob(".*.partial")), "nothing half-done stays behind"


def test_exports_load_elsewhere(undisturbed):
    export = undisturbed / "stages/export"
    model = AutoModelForCausalLM.from_pretrained(export / "tiny_hf")
    assert model.config.num_hidden_layers == 3
    assert model.config.head_dim == 8
    exported = load_file(export / "tiny_hf/model.safetensors")
    torch.testing.assert_close(exported["model.norm.weight"], weights(undisturbed)["decoder.final_layernorm.weight"])
    assert open_checkpoint(export / "tiny.nemo").spec == open_checkpoint(undisturbed / "stages/distill/student").spec


@pytest.mark.slow
def test_killed_in_every_stage_the_same_command_finishes_with_the_same_weights(
    undisturbed, inputs, temporary, tmp_path
):
    run = tmp_path / "run"
    for stage in NAMES:
        kill_in(stage, run, inputs, temporary)
        assert not (run / "stages" / stage / "DONE").is_file(), f"killed too late in {stage}"
    finished = subprocess.run(
        command(run, inputs), capture_output=True, text=True, env=environment(temporary), check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert not list(temporary.iterdir())
    expected = weights(undisturbed)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_training_saves_and_goes_on_from_there(undisturbed, inputs, tmp_path, number):
    run = tmp_path / "run"
    process = start(run, inputs)
    wait_for(lambda: len(training_rows(run)) >= 7, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    steps = len(training_rows(run))
    assert steps < 20
    assert list((run / "stages/.distill.partial/checkpoints").glob(f"{steps:08d}.ckpt"))
    finished = subprocess.run(command(run, inputs), capture_output=True, text=True, env=environment(), check=False)
    assert finished.returncode == 0, finished.stderr
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())
    rows = [row["step"] for row in training_rows(run)]
    assert rows == list(range(1, 21)), "every step is logged once"


def kill_in(stage: str, run: Path, inputs: list[str], temporary: Path) -> None:
    """SIGKILL as soon as a stage has begun; in training, after a checkpoint and a few more steps."""
    process = start(run, inputs, temporary=temporary)
    partial = run / "stages" / f".{stage}.partial"
    wait_for(lambda: len(training_rows(run)) >= 8 if stage == "distill" else partial.is_dir(), process)
    process.kill()
    process.communicate()
