"""What is refused before work, on a run that is complete and of which stages are done again."""

import json
from pathlib import Path

import pytest

from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.load import check, load_recipe
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import ConfigError, LayoutError, PlanError
from nemo_minitron.stages import preflight
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.files import write_json
from nemo_minitron.stages.plan import REDO, redo_mark
from nemo_minitron.stages.run_folder import DONE, RESULT, RunFolder
from tests.tiny import write_llama

RECIPE = Path(__file__).parents[2] / "recipes/llama3/llama31_8b_to_4b_width_8gpu_h100.yaml"


@pytest.fixture
def complete(tmp_path: Path) -> RunFolder:
    """A run folder all of whose stages look finished."""
    write_llama(tmp_path / "hf", max_position_embeddings=1024)
    opened, run = open_checkpoint(tmp_path / "hf"), RunFolder(tmp_path / "run")
    for stage in chain_for(recipe(tmp_path / "hf")):
        (run.stages / stage.name).mkdir(parents=True)
        (run.stages / stage.name / DONE).write_text("{}")
    result = {"spec": opened.spec.to_dict(), "family": opened.family}
    (run.stages / "import" / RESULT).write_text(json.dumps(result))
    return run


def recipe(source: Path, **sections: object) -> RunConfig:
    model = {"source": str(source)}
    return check(RunConfig, {"name": "x", "model": model, "data": {"sources": ["b"]}, **sections}, source="test")


def asked(run: RunFolder, redo_from: str | None, **sections: object) -> None:
    config = recipe(run.path.parent / "hf", **sections)
    preflight.check(chain_for(config), config, run, recipe="x", ranks=1, redo_from=redo_from)


@pytest.mark.parametrize(
    ("redo_from", "sections", "error", "words"),
    [
        ("score", {"target": {"ffn_hidden_size": 99999}}, PlanError, "99999"),
        ("prune", {"target": {"num_layers": 77}}, PlanError, "77"),
        ("distill", {"distill": {"batch": {"sequence_length": 4096}}}, ConfigError, "distill.batch.sequence_length"),
        ("distill", {"distill": {"batch": {"micro_batch_size": 3}}}, LayoutError, "distill.batch.global_batch_size"),
        ("data", {}, ConfigError, "data.sources: b"),
    ],
)
def test_stages_that_are_done_again_are_checked_though_they_are_complete(
    redo_from: str, sections: dict[str, object], error: type[Exception], words: str, complete: RunFolder
) -> None:
    asked(complete, None, **sections)
    asked(complete, "report", **sections)
    with pytest.raises(error, match=words):
        asked(complete, redo_from, **sections)


def test_fp8_wants_eight_positions_on_each_rank() -> None:
    fp8 = {"teacher_fp8": True, "batch": {"sequence_length": 1028, "global_batch_size": 8}}
    config = recipe(Path("a"), distill=fp8, precision="bf16")
    with pytest.raises(LayoutError, match=r"sequence_length = 1028 is not a multiple of 8, which distill.teacher_fp8"):
        preflight.check_batches(chain_for(config), config, 1)


def test_positions_are_not_divided_in_fp32() -> None:
    config = load_recipe(RECIPE, ["parallel.context=2", "distill.teacher_precision=fp32"])
    with pytest.raises(LayoutError, match=r"teacher_precision = fp32 with parallel\.context = 2"):
        preflight._check_precision(config)


def test_a_redo_that_was_cut_off_goes_on_without_its_sources(complete: RunFolder) -> None:
    """Its first stages are complete again; where the texts lay may be gone."""
    config = recipe(complete.path.parent / "hf")
    write_json(complete.stages / REDO, redo_mark("data", config.model_copy(update={"precision": Precision.FP32})))
    asked(complete, "data")
    with pytest.raises(ConfigError, match=r"data\.sources: b"):
        asked(complete, "import")
