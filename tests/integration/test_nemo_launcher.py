"""Jobs through NeMo-Framework-Launcher: what it writes for a recipe, by its own code where that is present.

NEMO_LAUNCHER_PATH names its folder `launcher_scripts`. The golden file was written by the launcher's `NeMoStage`
(core/stages.py at 0178fce) and `SlurmLauncher` (core/launchers.py at 050ccf2), with paths and job ids taken out;
exported variables are the launcher's own business.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.scripts import PruningSection, ScoringSection
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.launchers import nemo_launcher
from nemo_minitron.models.scripts import calibration_script, distillation_script

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/tiny/tiny_cpu.yaml"
GOLDEN = Path(__file__).with_name("nemo_launcher.golden")
GIVEN = ["model.source=/models/teacher", "data.sources=[/data/my texts]", "cluster.nodes=4", "parallel.tensor=2"]


def plan(*overrides: str) -> nemo_launcher.Plan:
    given = [*GIVEN, *overrides]
    config = load_recipe(RECIPE, given)
    return nemo_launcher.Plan(recipe="my.yaml", overrides=given, config=config, folder=Path("/results/tiny"))


@pytest.fixture(scope="module")
def scripts() -> Path:
    path = os.environ.get("NEMO_LAUNCHER_PATH")
    if path is None:
        pytest.skip("NEMO_LAUNCHER_PATH does not name the launcher_scripts of NeMo-Framework-Launcher")
    return Path(path)


def launch(scripts: Path, results: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    overrides = ",".join(f"'{item}'" for item in GIVEN)
    command = [
        *(sys.executable, "-m", "nemo_minitron.cli.nemo_launcher"),
        *(f"launcher_scripts_path={scripts}", f"base_results_dir={results}", f"+recipe={RECIPE}"),
        *(f"+overrides=[{overrides}]", "container=nemo.sqsh", "container_mounts=[/data,/models]"),
        *more,
    ]
    environment = os.environ | {"NEMO_LAUNCHER_DEBUG": "True"}
    return subprocess.run(command, env=environment, cwd=results, capture_output=True, text=True, check=False)


def test_the_launcher_writes_three_jobs_one_after_the_other(scripts, tmp_path):
    ended = launch(scripts, tmp_path, "stages=[score,prune,distill]", "cluster.account=research")

    assert ended.returncode == 0, ended.stderr
    jobs = ended.stdout.split()[-3:]
    texts = [next((tmp_path / "tiny" / name).glob("*_submission.sh")).read_text() for name in nemo_launcher.SCRIPTS]
    for before, text in zip(jobs, texts[1:], strict=False):
        assert f"#SBATCH --dependency=afterok:{before}\n" in text
    for text in texts:
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    written = "".join(texts).replace(str(tmp_path), "/results").replace(str(scripts), "/launcher")
    written = written.replace(str(ROOT), "/source")
    written = re.sub(r"^export .*\n", "", re.sub(r"afterok:\d+", "afterok:JOB", written), flags=re.MULTILINE)
    assert written == GOLDEN.read_text()


def test_words_of_a_recipe_survive_both_shells(scripts, tmp_path):
    ended = launch(scripts, tmp_path, "stages=[score]")
    assert ended.returncode == 0, ended.stderr
    text = next((tmp_path / "tiny/score").glob("*_submission.sh")).read_text()
    stubs = 'srun() { while [ "$1" != bash ]; do shift; done; "$@"; }\npython3() { printf \'%s\\n\' "$@"; }\n'
    shown = subprocess.run(
        ["bash", "-c", f"{stubs}export -f python3\n{text}"], capture_output=True, text=True, check=False
    )

    assert "data.sources=[/data/my texts]" in shown.stdout.splitlines()


def test_a_job_says_what_the_recipe_says():
    made = nemo_launcher.stage_config("distill", plan("distill.top_k=100", "parallel.recompute=full"), after="7")

    assert made.run == {
        "name": "tiny_distill",
        "results_dir": "/results/tiny/distill",
        "time_limit": "04:00:00",
        "dependency": "afterok:7",
    }
    assert (made.trainer.num_nodes, made.trainer.devices, made.trainer.max_steps) == (4, 8, 10240 // (8 * 64))
    script = distillation_script(made)
    assert script.settings.distillation.top_k == 100
    assert script.settings.optimizer == OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2)
    assert script.settings.parallel == ParallelConfig(tensor=2, recompute="full")
    assert script.section.steps == 20


def test_the_other_scripts_take_what_the_launcher_writes():
    scoring = calibration_script(nemo_launcher.stage_config("score", plan()), "scoring", ScoringSection).section
    assert (scoring.path, scoring.samples) == ("/results/tiny/score/scores.safetensors", 16)
    pruning = calibration_script(nemo_launcher.stage_config("prune", plan()), "pruning", PruningSection).section
    assert pruning.target == plan().config.target


def test_what_the_scripts_do_not_do_is_refused():
    with pytest.raises(ConfigError) as refused:
        nemo_launcher.submit({"stages": ["score", "evaluate"]}, plan("rounds=3", "correct={}"))

    assert refused.value.problems == [
        "stages: evaluate: one of score, prune, distill",
        "rounds: not through this launcher; use `nemo-minitron submit`",
        "correct: not through this launcher; use `nemo-minitron submit`",
    ]


def test_every_request_that_no_script_takes_up_is_refused():
    asked = {
        "score.first_sample": ["score.first_sample=4"],
        "score.sublayers": ["score.sublayers=true", "score.depth.samples=2"],
        "target.merge_layers": ["target.merge_layers=true", "target.num_layers=3"],
        "distill.patience": ["distill.patience=2"],
        "distill.finish_with": ["distill.finish_with=best"],
        "target.params": ["target.params=60000"],
        "target.ratio": ["target.ratio=0.8"],
    }
    for key, overrides in asked.items():
        with pytest.raises(ConfigError) as refused:
            nemo_launcher.submit({"stages": ["score"]}, plan(*overrides))
        assert refused.value.problems == [f"{key}: not through this launcher; use `nemo-minitron submit`"]


def test_without_the_launcher_the_error_says_what_to_give(tmp_path):
    ended = launch(tmp_path, tmp_path)

    assert ended.returncode == 2
    assert f"error: {tmp_path}: no NeMo-Framework-Launcher" in ended.stderr
