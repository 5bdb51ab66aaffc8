"""One recipe through torchrun, the example scripts as the NeMo launcher configures them, and NeMo-Run: one curve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_minitron.config.load import load_recipe
from nemo_minitron.launchers import nemo_launcher
from nemo_minitron.pruning.plan import PruningPlan
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/tiny/tiny_cpu.yaml"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """Overrides: a model, texts, and two ranks, which are data parallel."""
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=60)
    write_corpus(folder / "corpus")
    return [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]", "cluster.gpus_per_node=2"]


@pytest.fixture(scope="module")
def run(given, tmp_path_factory) -> Path:
    """The recipe through plain torchrun."""
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    execute(*TORCHRUN, "-m", "nemo_minitron", "run", str(RECIPE), *given, "--run-dir", str(folder))
    assert len(losses(folder)) == 20
    return folder


def execute(*command: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_example_scripts_make_the_same_scores_plan_and_losses(run, given):
    config = load_recipe(RECIPE, given)
    plan = nemo_launcher.Plan(recipe=str(RECIPE), overrides=given, config=config, folder=run)
    for stage, script in nemo_launcher.SCRIPTS.items():
        (run / stage).mkdir()
        OmegaConf.save(nemo_launcher.stage_config(stage, plan), run / stage / "hydra.yaml")
        where = (f"--config-path={run / stage}", "--config-name=hydra.yaml")
        execute(*TORCHRUN, str(ROOT / "examples" / f"{script}.py"), *where, f"hydra.run.dir={run / stage}")

    plans = [PruningPlan.load(run / folder / "plan.json") for folder in ("prune", "stages/prune")]
    assert plans[0].digest() == plans[1].digest()
    events = EventAccumulator(str(run / "distill/results"))
    events.Reload()
    seen = [event.value for event in events.Scalars("train/loss")]
    # TensorBoard keeps fp32; nothing else may differ.
    assert seen == np.float32(losses(run)).tolist()


def test_nemo_run_makes_the_same_losses(run, given, tmp_path, monkeypatch):
    pytest.importorskip("nemo_run", reason="the extra nemo-run is not installed")
    from nemo_minitron.launchers.nemorun import experiment

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    launched = experiment(str(RECIPE), given, tmp_path / "run", load_recipe(RECIPE, given))
    with launched:
        launched.run(tail_logs=True)

    assert losses(tmp_path / "run") == losses(run)
